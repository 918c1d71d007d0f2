"""The figures of one PPO step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.ppo.advantages import Advantages, explained_variance
from pipeline.ppo.kl import kl_estimate
from pipeline.rollout.rollout import Rollout
from pipeline.rollout.sampling import goes_on


@dataclass(frozen=True)
class Sample:
    """A prompt, a response and what was made of it."""

    prompt: str
    response: str
    score: float  # the reward
    parts: dict[str, float]  # the reward's components by name, before weighting
    kl: float  # of the response from the reference, nats: log p - log q summed over its tokens


@dataclass(frozen=True)
class StepReport:
    """What the trainer tells its caller after a step."""

    step: int  # finished, from 1
    metrics: dict[str, float]
    scores: Tensor  # (N,) rewards of the global batch
    parts: dict[str, Tensor]  # (N,) each: the reward's components by name, before weighting
    samples: list[Sample]


def step_metrics(rollout: Rollout, advantages: Advantages, eos_token_ids: Sequence[int]) -> dict[str, float]:
    """Figures of a rollout batch: rewards, KL, entropy, lengths, the critic's fit."""
    mask = rollout.response_mask
    tokens, samples = mask.sum(), len(rollout)
    lengths = mask.sum(1)
    last = rollout.response_tokens.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)
    k1 = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1")
    k3 = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k3")
    figures = {
        "reward/mean": rollout.scores.mean(),
        "reward/std": rollout.scores.std(),
        "reward/min": rollout.scores.min(),
        "reward/max": rollout.scores.max(),
        "reward/with_kl_penalty_mean": advantages.rewards.sum() / samples,
        "kl/sequence_k1": k1.sum() / samples,
        "kl/sequence_k3": k3.sum() / samples,
        "kl/token_k1": k1.sum() / tokens,
        "kl/token_k3": k3.sum() / tokens,
        "ppo/entropy": rollout.entropy.sum() / tokens,
        "ppo/value_explained_variance": explained_variance(rollout.values, advantages.returns, mask),
        "response/length_mean": lengths.float().mean(),
        "response/length_min": lengths.min(),
        "response/length_max": lengths.max(),
        "response/eos_fraction": (~goes_on(last, eos_token_ids)).float().mean(),
    }
    return dict(zip(figures, torch.stack([v.float() for v in figures.values()]).tolist(), strict=True))


def part_metrics(rollout: Rollout, names: Sequence[str]) -> dict[str, float]:
    """Means of the reward's components, before and after weighting."""
    figures = {}
    for i, name in enumerate(names):
        figures[f"reward/{name}/raw_mean"] = rollout.parts[:, i].mean().item()
        figures[f"reward/{name}/weighted_mean"] = rollout.weighted[:, i].mean().item()
    return figures


def step_report(
    step: int,
    metrics: dict[str, float],
    rollout: Rollout,
    names: Sequence[str],
    prompts: Sequence[str],
    responses: Sequence[str],
) -> StepReport:
    """A step's figures; `prompts` and `responses` are the first samples' texts, `names` the reward's components."""
    some = rollout.take(slice(0, len(responses)))
    kl = kl_estimate(some.logprobs, some.ref_logprobs, "k1").sum(1).tolist()
    parts = [dict(zip(names, row, strict=True)) for row in some.parts.tolist()]
    rows = zip(prompts, responses, some.scores.tolist(), parts, kl, strict=True)
    all_parts = dict(zip(names, rollout.parts.unbind(1), strict=True))
    return StepReport(step, metrics, rollout.scores, all_parts, [Sample(*row) for row in rows])
