"""From logits and uniform numbers to tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.runtime.randomness import generator


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn. Anything but temperature makes the KL reported for the samples wrong."""

    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_tokens: int = 0  # EOS cannot come before
    greedy: bool = False

    @property
    def is_pure(self) -> bool:
        """Whether samples follow the distribution whose log-probs are reported."""
        return not self.greedy and self.top_k == 0 and self.top_p >= 1.0 and self.min_tokens == 0


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token a row: probabilities (B, V) float32, uniforms (B,) in [0, 1) -> (B,).

    The cumulative sum is not exactly 1; scaling the uniform by its last entry and staying below it keeps rounding from
    handing a turn to tokens of probability zero at the end of the vocabulary.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniforms.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def restrict(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Set the logits outside the top k, and outside the smallest set of mass top_p, to -inf: (B, V) -> (B, V)."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def next_tokens(logits: Tensor, uniforms: Tensor, step: int, eos_token_id: int, options: SamplingOptions) -> Tensor:
    """Tokens (B,) for response position `step`, from logits (B, V) and uniforms (B,)."""
    logits = logits.float() / options.temperature
    if step < options.min_tokens:
        logits = logits.index_fill(1, torch.tensor([eos_token_id], device=logits.device), -torch.inf)
    if options.greedy:
        return logits.argmax(-1)
    return inverse_cdf(restrict(logits, top_k=options.top_k, top_p=options.top_p).softmax(-1), uniforms)


def sampling_noise(seed: int, step: int, count: int, shortest: int, longest: int) -> tuple[Tensor, Tensor]:
    """A global batch's noise: uniforms (count, longest) in [0, 1), length limits (count,) in [shortest, longest]."""
    uniforms = generator(seed, "sampling", step).random((count, longest), dtype="float32")
    lengths = generator(seed, "response lengths", step).integers(shortest, longest + 1, count)
    return torch.from_numpy(uniforms), torch.from_numpy(lengths)
