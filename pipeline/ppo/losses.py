"""PPO's clipped losses, summed over tokens so that any split of a minibatch adds up to the same loss."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PPOLoss:
    """Sums over the tokens of a microbatch; divide by the minibatch's token count for means."""

    loss: Tensor  # () policy + value_coef * value, with gradient
    policy_loss: Tensor  # ()
    value_loss: Tensor  # () with gradient
    policy_clipped: Tensor  # () tokens whose clipped ratio decided the loss
    value_clipped: Tensor  # () tokens whose clipped value decided the loss
    approx_kl: Tensor  # () k3 estimate of KL(old policy || policy)
    ratio: Tensor  # () sum of the ratios
    ratio_max: Tensor  # () largest ratio
    ratio_deviation: Tensor  # () largest |ratio - 1|


def policy_losses(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Each token's max(-A r, -A clip(r, 1 - c, 1 + c)), r = exp(logprob - old); Schulman et al. 2017, equation 7.

    All arguments have one shape, which is that of the result.
    """
    ratio = (logprobs - old_logprobs).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def ppo_loss(
    logprobs: Tensor,
    values: Tensor,
    old_logprobs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    *,
    clip_range: float,
    value_clip_range: float,
    value_coef: float,
) -> PPOLoss:
    """Clipped surrogate (`policy_losses`) and clipped value loss; every argument (T,), real tokens only.

    Value: half the larger of (v - R)^2 and (clip(v, old - c, old + c) - R)^2, as in lm-human-preferences.
    """
    policy_loss = policy_losses(logprobs, old_logprobs, advantages, clip_range).sum()
    change = values - old_values
    clipped_values = old_values + change.clamp(-value_clip_range, value_clip_range)
    error, clipped_error = (values - returns).square(), (clipped_values - returns).square()
    value_loss = 0.5 * torch.maximum(error, clipped_error).sum()
    loss = policy_loss + value_coef * value_loss
    with torch.no_grad():
        log_ratio = logprobs - old_logprobs
        ratio = log_ratio.exp()
        held = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range) > -advantages * ratio
        return PPOLoss(
            loss=loss,
            policy_loss=policy_loss.detach(),
            value_loss=value_loss,
            policy_clipped=held.sum(),
            value_clipped=((change.abs() > value_clip_range) & (clipped_error > error)).sum(),
            approx_kl=(torch.expm1(log_ratio) - log_ratio).sum(),
            ratio=ratio.sum(),
            ratio_max=ratio.max(),
            ratio_deviation=(ratio - 1).abs().max(),
        )
