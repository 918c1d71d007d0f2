"""From logits and uniform numbers to tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import RolloutSettings
from pipeline.runtime.randomness import generator

BLOCK = 256  # tokens


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


def sampling_options(rollout: RolloutSettings) -> SamplingOptions:
    """How a recipe samples."""
    return SamplingOptions(rollout.temperature, rollout.top_k, rollout.top_p, rollout.eos_min_tokens)


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token a row: probabilities (B, V) float32, uniforms (B,) in [0, 1) -> (B,).

    Cumulative sums are taken over blocks of the vocabulary, then within one block, since a sum over all of it is slow.
    They are not exactly 1; scaling the uniform by their last entry and staying below it keeps rounding from handing a
    turn to tokens of probability zero.
    """
    batch, vocabulary = probabilities.shape
    whole = vocabulary // BLOCK * BLOCK
    sums = probabilities[:, :whole].view(batch, -1, BLOCK).sum(-1)
    if whole < vocabulary:
        sums = torch.cat([sums, probabilities[:, whole:].sum(-1, keepdim=True)], 1)
    before = sums.cumsum(-1)
    target = _below(uniforms.unsqueeze(1) * before[:, -1:], before[:, -1:])
    block = torch.searchsorted(before, target, right=True).clamp_max(before.shape[1] - 1)  # NaN is beyond all blocks
    target = target - (before.gather(1, block) - sums.gather(1, block))
    tokens = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = probabilities.gather(1, tokens.clamp_max(vocabulary - 1)).masked_fill(tokens >= vocabulary, 0.0).cumsum(-1)
    within = torch.searchsorted(inside, _below(target, inside[:, -1:]), right=True)
    return (block * BLOCK + within).clamp_max(vocabulary - 1).squeeze(1)


def _below(target: Tensor, total: Tensor) -> Tensor:
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


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


def goes_on(tokens: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """Which tokens end no response, in the shape of `tokens`.

    The ids are compared one by one: a tensor of them would be copied from the host, which a captured step cannot do.
    """
    found = tokens != eos_token_ids[0]
    for other in eos_token_ids[1:]:
        found = found & (tokens != other)
    return found


def next_tokens(
    logits: Tensor, uniforms: Tensor, step: Tensor, eos_token_ids: Sequence[int], options: SamplingOptions
) -> Tensor:
    """Tokens (B,) for response position `step` (1,), from logits (B, V) and uniforms (B,).

    From logits that are NaN some token of the vocabulary is drawn: who reads the log-probs finds out.
    """
    logits = logits.float()
    if options.temperature != 1.0:
        logits = logits / options.temperature
    if options.min_tokens:
        held = logits.clone()
        for eos_token_id in eos_token_ids:
            held[:, eos_token_id] = -torch.inf
        logits = torch.where(step < options.min_tokens, held, logits)
    if options.greedy:
        return logits.argmax(-1)
    return inverse_cdf(restrict(logits, top_k=options.top_k, top_p=options.top_p).softmax(-1), uniforms)


def sampling_noise(seed: int, step: int, count: int, shortest: int | None, longest: int) -> tuple[Tensor, Tensor]:
    """A global batch's noise: uniforms (count, longest) in [0, 1), length limits (count,) in [shortest, longest].

    Without `shortest` every limit is `longest`.
    """
    uniforms = generator(seed, "sampling", step).random((count, longest), dtype="float32")
    shortest = longest if shortest is None else shortest
    lengths = generator(seed, "response lengths", step).integers(shortest, longest + 1, count)
    return torch.from_numpy(uniforms), torch.from_numpy(lengths)
