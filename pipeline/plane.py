"""The plane of KL and reward: the way a training took over it, and a figure of that under the frontier."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.frontiers import Frontier

POINTS = 24  # of the way, each the mean of as many steps as it takes


def way_of(metrics_file: Path, metric: str = "reward/mean") -> list[dict[str, float]]:
    """Where a training went, from its metrics.jsonl: means of a few steps each, {"step" of the last, "kl", "reward"}.

    KL is nats a response, reward the figure named `metric`; both are of the responses sampled for training.
    """
    if not metrics_file.is_file():
        return []
    return way_of_steps([json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()], metric)


def way_of_steps(steps: Sequence[Mapping[str, float]], metric: str = "reward/mean") -> list[dict[str, float]]:
    """The same from the metrics of each step; those of a spoilt step that are no numbers are passed over."""
    steps = [step for step in steps if None not in (step.get("kl/sequence_k1"), step.get(metric))]
    size = max(1, math.ceil(len(steps) / POINTS))
    windows = [steps[start : start + size] for start in range(0, len(steps), size)]
    return [
        {
            "step": window[-1]["step"],
            "kl": float(np.mean([step["kl/sequence_k1"] for step in window])),
            "reward": float(np.mean([step[metric] for step in window])),
        }
        for window in windows
    ]


def curve_of(frontier: Frontier) -> dict[str, object]:
    """The frontier as evaluation.json keeps it for reports: the first `trusted` points of "kl" and "reward" are sure.

    "band_kl_low" and "band_kl_high" are the 95 % interval of the KL that "band_reward" needs, None where not known.
    """
    levels, low, high = frontier.band()
    band = {"band_reward": levels, "band_kl_low": low, "band_kl_high": high}
    return {
        "trusted": int(frontier.trusted.sum()),
        "kl": frontier.kls.mean(0).tolist(),
        "reward": frontier.rewards.mean(0).tolist(),
        **{name: [None if math.isnan(x) else x for x in values.tolist()] for name, values in band.items()},
    }


def draw_plane(path: Path, figures: Mapping[str, object], frontier: Frontier | None) -> None:
    """Draw the run of an evaluation's figures, and the best reward at each KL where it is known, as a PNG."""
    from matplotlib.figure import Figure  # takes a second: only who draws pays

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if frontier is not None:
        draw_frontier(axes, frontier)
    way, reward = figures["way"], figures["reward"]
    axes.plot(*_points(way), ".-", color="tab:orange", linewidth=1, label="training, means of steps")
    axes.plot(0, reward["before"]["mean"], "o", color="tab:gray", label="original, held-out prompts")
    after = reward["after"]
    axes.errorbar(
        figures["kl"], after["mean"], xerr=_error(figures["kl"], figures["kl_ci95"]),
        yerr=_error(after["mean"], after["ci95"]), fmt="o", color="tab:red", capsize=3,
        label="tuned, held-out prompts (95 % interval)",
    )  # fmt: skip
    axes.set(xlabel="KL from the original, nats a response", ylabel=f"mean reward ({reward['name']})")
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def draw_frontier(axes: object, frontier: Frontier) -> None:
    """Draw the best reward at each KL with its interval into matplotlib axes; dotted where it is not to be trusted."""
    trusted, rewards, kls = frontier.trusted, frontier.rewards.mean(0), frontier.kls.mean(0)
    axes.plot(kls[trusted], rewards[trusted], color="tab:blue", label="best possible")
    beyond = ~trusted | np.append(~trusted[1:], True)  # from the last trusted point on
    axes.plot(kls[beyond], rewards[beyond], ":", color="tab:blue", label="too few samples to be sure")
    levels, low, high = frontier.band()
    axes.fill_betweenx(levels, low, high, color="tab:blue", alpha=0.2, linewidth=0)


def _points(way: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    return [point["kl"] for point in way], [point["reward"] for point in way]


def _error(mean: float, interval: list[float]) -> list[list[float]]:
    return [[max(0.0, mean - interval[0])], [max(0.0, interval[1] - mean)]]
