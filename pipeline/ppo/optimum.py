"""The optimal policy under a price of KL, estimated from samples of the reference: pure functions on tensors.

For a price beta of one nat the policy that maximises E[r] - beta KL(pi || ref) is ref(y|x) exp(r(x, y) / beta) / Z(x)
(Ziegler et al. 2019; Rafailov et al. 2023, equation 4). Samples of the reference, weighted by exp(r / beta), are
samples of it, so its reward and KL at each beta can be had without training. No policy has more reward at that KL.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Optimum:
    """Estimates for each price (B,) and prompt (n,)."""

    reward: Tensor  # (B, n) expected reward
    kl: Tensor  # (B, n) nats
    effective_samples: Tensor  # (B, n) 1 / the sum of squared weights


def optimum(rewards: Tensor, prices: Tensor) -> Optimum:
    """Self-normalised importance sampling from the reference to the optimal policy.

    KL(pi || ref) = E_pi[log pi/ref] = E_pi[r] / beta - log Z, and Z is the mean of exp(r / beta).

    Args:
        rewards: (n, M) of M samples of the reference for each of n prompts, float64 for long tails; NaN where a prompt
            has fewer.
        prices: (B,) betas, in units of reward a nat.
    """
    missing = rewards.isnan()
    exponents = (rewards / prices.view(-1, 1, 1)).masked_fill(missing, -torch.inf)  # (B, n, M)
    weights = exponents.softmax(-1)
    log_normaliser = exponents.logsumexp(-1) - (~missing).sum(1, dtype=rewards.dtype).log()
    mean = (weights * rewards.masked_fill(missing, 0.0)).sum(-1)
    kl = (mean / prices.view(-1, 1) - log_normaliser).clamp_min(0.0)
    return Optimum(mean, kl, 1.0 / weights.square().sum(-1))


def kl_at(reward: Tensor, rewards: Tensor, kls: Tensor) -> Tensor:
    """The KL (...) at which each curve reaches its `reward` (...), by interpolation; NaN outside of them.

    Args:
        rewards, kls: (..., B) points of each curve, both rising along the last dimension.
    """
    target = reward.to(rewards.dtype).unsqueeze(-1)
    above = torch.searchsorted(rewards.contiguous(), target)
    inside = (above > 0) & (above < rewards.shape[-1])
    above = above.clamp(1, rewards.shape[-1] - 1)
    (r0, r1), (k0, k1) = ((x.gather(-1, above - 1), x.gather(-1, above)) for x in (rewards, kls))
    part = (target - r0) / (r1 - r0).clamp_min(1e-12)
    return torch.where(inside, k0 + part * (k1 - k0), torch.nan).squeeze(-1)
