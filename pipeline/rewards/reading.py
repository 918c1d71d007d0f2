"""Rewards of what the reference says of a response: it has read every one already, for the KL."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.policy import Reference
from pipeline.rollout.rollout import Responses, reference_logprobs


@dataclass(frozen=True)
class Reading:
    """Log-probabilities of n responses under the reference, zero on padding."""

    mask: Tensor  # (n, R)
    logprobs: Tensor  # (n, R) after the prompt
    unprompted: Tensor | None  # (n, R) after nothing but the first token of a text, where it was asked for

    def mean(self, values: Tensor) -> Tensor:
        """Means (n,) of values (n, R) over each response's tokens."""
        return values.sum(1) / self.mask.sum(1)


def joined(readings: Sequence[Reading]) -> Reading:
    """One reading of several batches of equal width, in their order."""
    alone = None if readings[0].unprompted is None else torch.cat([reading.unprompted for reading in readings])
    masks, logprobs = ([getattr(reading, name) for reading in readings] for name in ("mask", "logprobs"))
    return Reading(torch.cat(masks), torch.cat(logprobs), alone)


ReadingReward = Callable[[Reading], Tensor]  # scores (n,)


def fluency(reading: Reading) -> Tensor:
    """Mean log-probability of a response's tokens under the reference, nats: minus the log of its perplexity."""
    return reading.mean(reading.logprobs)


def coherence(reading: Reading) -> Tensor:
    """How much likelier the prompt makes the response, nats a token.

    The pointwise mutual information of prompt and response under the reference, over the response's length: what Li et
    al. 2016 ("a diversity-promoting objective", MMI-antiLM) and Holtzman et al. 2021 (surface form competition) score
    continuations by. Chosen over an embedding's similarity since it needs no further model, knows the tokens the policy
    writes, and is not raised by repeating the prompt's words alone.
    """
    return reading.mean(reading.logprobs - reading.unprompted)


@dataclass(frozen=True)
class Length:
    """Minus the number of tokens by which a response's length misses a range; EOS counts as one."""

    low: int
    high: int

    def __call__(self, reading: Reading) -> Tensor:
        tokens = reading.mask.sum(1)
        return -((self.low - tokens).clamp(0) + (tokens - self.high).clamp(0)).float()


def read(
    reference: Reference,
    responses: Responses,
    ref_logprobs: Tensor | None = None,
    *,
    unprompted: bool,
    start_ids: Sequence[int],
    temperature: float,
    microbatch_size: int,
) -> Reading:
    """What the reference says of the responses; one forward more where it is asked for without the prompts.

    Args:
        ref_logprobs: (n, R), where they are known already.
        start_ids: what a text begins with where nothing stands before the response.
    """
    options = {"temperature": temperature, "microbatch_size": microbatch_size}
    if ref_logprobs is None:
        ref_logprobs = reference_logprobs(reference, responses, **options)
    alone = None
    if unprompted:
        first = torch.stack([torch.full_like(responses.prompt_tokens[:, 0], id) for id in start_ids], 1)
        bare = Responses(first, torch.ones_like(first, dtype=torch.bool), responses.response_tokens,
                         responses.response_mask)  # fmt: skip
        alone = reference_logprobs(reference, bare, **options)
    return Reading(responses.response_mask, ref_logprobs, alone)
