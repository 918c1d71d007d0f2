"""From scores to advantages: token rewards, generalised advantage estimation, whitening."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Advantages:
    """What the update learns from; zero on padding."""

    advantages: Tensor  # (N, R) whitened over the batch
    returns: Tensor  # (N, R) before whitening: the value head's targets
    rewards: Tensor  # (N, R) score at the last token, minus the KL penalty at each


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Per-token reward (N, R): -kl_coef * kl on every real token, plus the score on the last one.

    Over a sample the rewards sum to score - kl_coef * sum(kl). Source: Ziegler et al. 2019, equation 2.

    Args:
        scores: (N,) one score a response.
        kl: (N, R) per-token KL estimates in nats.
        mask: (N, R), each row True from the left, at least once.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1))


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns), each (N, R), zero on padding. The value after the last real token is zero.

    Source: Schulman et al. 2016, equation 16; returns = advantages + values.
    """
    values = torch.where(mask, values, 0.0)
    rewards = torch.where(mask, rewards, 0.0)
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(running)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * gae_lambda * running, 0.0)
        advantages[:, t] = running
        next_value = values[:, t]
    return advantages, advantages + values


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` over the True positions of `mask`: a scalar."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0 and (biased) variance 1 over the real positions; zero elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + eps), 0.0)


def compute_advantages(
    scores: Tensor,
    kl: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    gamma: float,
    gae_lambda: float,
) -> Advantages:
    """Token rewards, GAE, then whitening over the whole batch given: scores (N,), the others (N, R)."""
    rewards = token_rewards(scores, kl, mask, kl_coef)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    return Advantages(whiten(advantages, mask), returns, rewards)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the real positions: 1 is a perfect critic, 0 a constant one."""
    residual, target = (returns - values)[mask], returns[mask]
    return 1 - residual.var(correction=0) / target.var(correction=0).clamp_min(1e-12)
