"""How far a figure can be trusted: bootstrap and Wilson intervals, and the agreement of two rankings."""

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import kendalltau, rankdata

BOOTSTRAP_SEED = 20260
BOOTSTRAP_SAMPLES = 10_000
RANKING_SAMPLES = 1_000  # a resample's ranks cost a hundred times its mean
NORMAL_95 = 1.959964  # 95 % of a normal distribution lie so many standard deviations around its mean
RANKINGS = ("spearman", "kendall_tau_b", "pairwise_accuracy")  # what `rank_agreement` gives, in its order


def bootstrap_interval(
    values: np.ndarray,
    *,
    level: float = 0.95,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda drawn: drawn.mean(1),
    samples: int = BOOTSTRAP_SAMPLES,
) -> tuple:
    """Percentile bootstrap interval of a statistic of `values`, by default the mean, from a fixed seed (Efron 1979).

    Args:
        values: (n,) or (n, k); whole rows are drawn.
        statistic: of resamples (m, n) or (m, n, k), to (m,) or (m, j); NaN where a resample has none, and left out.

    Returns:
        (low, high): two floats, or two lists of j.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    block = max(1, min(500, 5_000_000 // len(values)))  # resamples in memory at a time
    sizes = [min(block, samples - start) for start in range(0, samples, block)]
    found = [statistic(values[rng.integers(len(values), size=(size, len(values)))]) for size in sizes]
    low, high = np.nanquantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low.tolist(), high.tolist()


def wilson_interval(wins: float, total: int) -> tuple[float, float]:
    """95 % interval of a share `wins / total` (Wilson 1927): none of it outside [0, 1], right for few cases too.

    A tie counts as half a win; the interval is then a little too wide.
    """
    share, extra = wins / total, NORMAL_95**2 / total
    middle = (share + extra / 2) / (1 + extra)
    half = math.sqrt(extra * share * (1 - share) + extra**2 / 4) / (1 + extra)
    return max(0.0, middle - half), min(1.0, middle + half)


def rank_agreement(scores: np.ndarray, ratings: np.ndarray) -> tuple[float, float, float]:
    """Spearman's rho, Kendall's tau-b and the pairwise accuracy of `scores` (n,) for `ratings` (n,).

    The last is the share of the pairs of different rating that the scores order alike, equal scores half; it follows
    from tau-b and the numbers of ties. NaN each where all scores or all ratings are equal.
    """
    if (scores == scores[0]).all() or (ratings == ratings[0]).all():
        return math.nan, math.nan, math.nan
    spearman = np.corrcoef(rankdata(scores), rankdata(ratings))[0, 1]
    tau = kendalltau(scores, ratings).statistic
    pairs = len(scores) * (len(scores) - 1) / 2
    untied_scores, untied_ratings = pairs - _ties(scores), pairs - _ties(ratings)
    return spearman, tau, (1 + tau * math.sqrt(untied_scores / untied_ratings)) / 2


def _ties(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return (counts * (counts - 1) / 2).sum()


def rank_figures(scores: np.ndarray, ratings: np.ndarray) -> dict[str, dict[str, object] | None]:
    """`rank_agreement` by name, each {"value", "ci95"}, the interval by bootstrap; None where there is none."""
    found = rank_agreement(scores, ratings)
    if math.isnan(found[0]):
        return dict.fromkeys(RANKINGS)
    low, high = bootstrap_interval(
        np.stack([scores, ratings], 1),
        statistic=lambda drawn: np.array([rank_agreement(*rows.T) for rows in drawn]),
        samples=RANKING_SAMPLES,
    )
    return {name: {"value": float(v), "ci95": [a, b]} for name, v, a, b in zip(RANKINGS, found, low, high, strict=True)}
