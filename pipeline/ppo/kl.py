"""KL estimators and the coefficient's controller."""

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) on tokens the policy sampled, in nats, same shape as the inputs.

    With d = log p - log q: k1 = d (unbiased, any sign), k2 = d^2 / 2 (low variance, biased), k3 = exp(-d) - 1 + d
    (unbiased, never negative). Source: Schulman, "Approximating KL Divergence", 2020.

    Raises:
        ValueError: an unknown estimator.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"KL estimator {estimator!r} is not one of k1, k2, k3")


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: int, samples: int) -> float:
    """The KL coefficient after a batch of `samples` whose mean sequence KL (sum over tokens, nats) was `kl`.

    Ziegler et al. 2019, section 2.2: the relative error kl / target - 1 is clipped to +-0.2, and the coefficient is
    multiplied by 1 + error * samples / horizon.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * samples / horizon)
