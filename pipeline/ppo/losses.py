"""PPO's clipped losses, summed over tokens so that any split of a minibatch adds up to the same loss."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PPOLoss:
    """Sums over the real tokens of a microbatch; divide by the minibatch's token count for means."""

    loss: Tensor  # () policy + value_coef * value, with gradient
    policy_loss: Tensor  # ()
    value_loss: Tensor  # ()
    policy_clipped: Tensor  # () tokens whose clipped ratio decided the loss
    value_clipped: Tensor  # () tokens whose clipped value decided the loss
    approx_kl: Tensor  # () k3 estimate of KL(old policy || policy)
    ratio: Tensor  # () sum of the ratios
    ratio_max: Tensor  # () largest ratio
    ratio_deviation: Tensor  # () largest |ratio - 1|


def ppo_loss(
    logprobs: Tensor,
    values: Tensor,
    old_logprobs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    value_clip_range: float,
    value_coef: float,
) -> PPOLoss:
    """Clipped surrogate and clipped value loss; every argument (B, R), real where `mask` is True.

    Policy: max(-A r, -A clip(r, 1 - c, 1 + c)), r = exp(logprob - old); Schulman et al. 2017, equation 7. Value:
    half the larger of (v - R)^2 and (clip(v, old - c, old + c) - R)^2, as in lm-human-preferences.
    """
    # Padding is cut off before the arithmetic: where(mask, f(x), 0) alone lets a NaN there into the gradient.
    logprobs, old_logprobs, values, old_values, advantages, returns = (
        torch.where(mask, x, 0.0) for x in (logprobs, old_logprobs, values, old_values, advantages, returns)
    )
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    policy_loss = torch.where(mask, torch.maximum(unclipped, clipped), 0.0).sum()

    change = values - old_values
    clipped_values = old_values + change.clamp(-value_clip_range, value_clip_range)
    error, clipped_error = (values - returns).square(), (clipped_values - returns).square()
    value_loss = 0.5 * torch.where(mask, torch.maximum(error, clipped_error), 0.0).sum()
    loss = policy_loss + value_coef * value_loss

    with torch.no_grad():
        approx_kl = torch.where(mask, torch.expm1(log_ratio) - log_ratio, 0.0).sum()
        deviation = torch.where(mask, (ratio - 1).abs(), 0.0).max()
        return PPOLoss(
            loss=loss,
            policy_loss=policy_loss.detach(),
            value_loss=value_loss.detach(),
            policy_clipped=(mask & (clipped > unclipped)).sum(),
            value_clipped=(mask & (change.abs() > value_clip_range) & (clipped_error > error)).sum(),
            approx_kl=approx_kl,
            ratio=torch.where(mask, ratio, 0.0).sum(),
            ratio_max=torch.where(mask, ratio, 0.0).max(),
            ratio_deviation=deviation,
        )
