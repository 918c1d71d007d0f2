"""PPO's formulas written a second time from the papers: plain Python loops over ragged float64 lists, no tensors."""

import math

import numpy as np

Rows = list[list[float]]


def ragged(seed: int, samples: int = 6, longest: int = 7, *, spread: float = 1.0) -> Rows:
    """Rows of normal numbers; the lengths depend on `samples` and `longest` only and include 1 and `longest`."""
    lengths = np.random.default_rng(samples * 100 + longest).integers(1, longest + 1, samples)
    lengths[0], lengths[-1] = 1, longest
    draw = np.random.default_rng(seed)
    return [[float(x) for x in draw.normal(0, spread, n)] for n in lengths]


def sequence_rewards(scores: list[float], kl: Rows, kl_coef: float) -> Rows:
    """Ziegler et al. 2019, equation 2: every token pays for its KL, the last one earns the score."""
    rewards = []
    for score, row in zip(scores, kl, strict=True):
        paid = [-kl_coef * k for k in row]
        paid[-1] += score
        rewards.append(paid)
    return rewards


def gae(rewards: Rows, values: Rows, gamma: float, lam: float) -> tuple[Rows, Rows]:
    """Schulman et al. 2016: A_t = sum over l of (gamma lam)^l delta_(t+l); returns A_t + V_t. V is 0 after the end."""
    all_advantages, all_returns = [], []
    for r, v in zip(rewards, values, strict=True):
        after = [*v[1:], 0.0]
        deltas = [r[t] + gamma * after[t] - v[t] for t in range(len(r))]
        row = [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(r))) for t in range(len(r))]
        all_advantages.append(row)
        all_returns.append([a + b for a, b in zip(row, v, strict=True)])
    return all_advantages, all_returns


def whitened(rows: Rows) -> Rows:
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / len(flat)
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


def explained(values: Rows, returns: Rows) -> float:
    target = [x for row in returns for x in row]
    left = [r - v for vs, rs in zip(values, returns, strict=True) for v, r in zip(vs, rs, strict=True)]
    return 1 - float(np.var(left) / np.var(target))


def kl(logprob: float, ref_logprob: float, estimator: str) -> float:
    """Schulman 2020, with r = q / p: k1 = -log r, k2 = (log r)^2 / 2, k3 = (r - 1) - log r."""
    r = math.exp(ref_logprob) / math.exp(logprob)
    return {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": (r - 1) - math.log(r)}[estimator]


def ppo(
    logprobs: Rows,
    values: Rows,
    old_logprobs: Rows,
    old_values: Rows,
    advantages: Rows,
    returns: Rows,
    *,
    clip_range: float,
    value_clip_range: float,
    value_coef: float,
) -> dict:
    """Sums over tokens of Schulman et al. 2017, equation 7, and of the clipped value loss; gradients by hand."""
    out = dict.fromkeys(("policy_loss", "value_loss", "policy_clipped", "value_clipped", "approx_kl", "ratio"), 0.0)
    ratios, logprob_gradient, value_gradient = [], [], []
    for i in range(len(logprobs)):
        logprob_gradient.append([])
        value_gradient.append([])
        for t in range(len(logprobs[i])):
            advantage, old = advantages[i][t], old_values[i][t]
            ratio = math.exp(logprobs[i][t] - old_logprobs[i][t])
            # The objective is min(r A, clip(r) A): a gain stops counting past the bound, a loss always counts.
            too_far = ratio > 1 + clip_range if advantage > 0 else ratio < 1 - clip_range
            bound = 1 + clip_range if advantage > 0 else 1 - clip_range
            out["policy_loss"] -= (bound if too_far else ratio) * advantage
            out["policy_clipped"] += too_far and advantage != 0
            logprob_gradient[i].append(0.0 if too_far else -ratio * advantage)

            error = values[i][t] - returns[i][t]
            near = min(max(values[i][t], old - value_clip_range), old + value_clip_range)
            held = (near - returns[i][t]) ** 2 > error**2
            out["value_loss"] += 0.5 * ((near - returns[i][t]) ** 2 if held else error**2)
            out["value_clipped"] += held
            value_gradient[i].append(0.0 if held else value_coef * error)

            out["approx_kl"] += kl(old_logprobs[i][t], logprobs[i][t], "k3")
            out["ratio"] += ratio
            ratios.append(ratio)
    out["loss"] = out["policy_loss"] + value_coef * out["value_loss"]
    out["ratio_max"] = max(ratios)
    out["ratio_deviation"] = max(abs(r - 1) for r in ratios)
    return out | {"logprob_gradient": logprob_gradient, "value_gradient": value_gradient}
