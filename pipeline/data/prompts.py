"""Prompts: the first few tokens of long reviews."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.data.sources import DataError, Reviews, counted, is_held_out
from pipeline.data.tokens import prefix_ids, prompt_text, text_ids
from pipeline.runtime.randomness import generator


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one batch, left-padded to a common width."""

    tokens: Tensor  # (N, P)
    mask: Tensor  # (N, P) True on real tokens
    text: list[str]  # [N]

    def __len__(self) -> int:
        return len(self.text)

    def slice(self, start: int, stop: int) -> "PromptBatch":
        return PromptBatch(self.tokens[start:stop], self.mask[start:stop], self.text[start:stop])

    def take(self, index: np.ndarray) -> "PromptBatch":
        """The prompts at `index`, in that order."""
        where = torch.from_numpy(index)
        return PromptBatch(self.tokens[where], self.mask[where], [self.text[i] for i in index])


@dataclass(frozen=True)
class Openings:
    """The first tokens of many reviews, each different from the others."""

    tokens: Tensor  # (M, prefix_tokens + max_tokens)
    prefix_tokens: int = 0  # before every text: part of every prompt, not of the lengths drawn
    notes: tuple[str, ...] = ()  # what the source's rows lost on their way, a sentence each; the training side has them

    def __len__(self) -> int:
        return len(self.tokens)


def make_openings(
    reviews: Reviews, tokenizer: PreTrainedTokenizerBase, *, min_characters: int, max_tokens: int
) -> tuple[Openings, Openings]:
    """Cut openings of exactly `max_tokens` tokens from reviews longer than `min_characters`, after the model's prefix.

    Of several reviews with the same opening the first is kept, so none stands on both sides of the split.

    Returns:
        (training, held-out) openings; the held-out tenth is that of `is_held_out`.

    Raises:
        DataError: no review is long enough, or one side of the split is empty.
    """
    texts = [text for text in reviews.texts if len(text) > min_characters]
    if not texts:
        raise DataError(
            f"none of the {len(reviews)} reviews is longer than min_review_characters={min_characters}; lower it."
        )
    # Words are tokenized one by one, so the first tokens of a generous prefix are the first tokens of the whole text.
    prefixes = [text[: 24 * max_tokens + 64] for text in texts]
    ids = text_ids(tokenizer, prefixes)
    unique: dict[tuple[int, ...], str] = {}
    for text, tokens in zip(texts, ids, strict=True):
        if len(tokens) >= max_tokens:
            unique.setdefault(tuple(tokens[:max_tokens]), text)
    sides: tuple[list, list] = ([], [])
    for opening, text in unique.items():
        sides[is_held_out(text)].append(opening)
    for side, name in zip(sides, ("training", "held-out"), strict=True):
        if not side:
            raise DataError(_no_opening(name, ids, len(unique), max_tokens))
    long = sum(len(tokens) >= max_tokens for tokens in ids)
    alike = f"texts open like an earlier one, in all of {max_tokens} tokens, and give no prompt"
    notes = (
        *reviews.notes,
        *counted(len(reviews) - len(texts), len(reviews), f"texts are no longer than {min_characters} characters "
                 f"(min_review_characters) and give no prompt"),
        *counted(len(texts) - long, len(texts), f"texts have fewer than {max_tokens} tokens and give no prompt"),
        *counted(long - len(unique), long, alike),
    )  # fmt: skip
    prefix = prefix_ids(tokenizer)
    training, held_out = (torch.tensor([[*prefix, *opening] for opening in side]) for side in sides)
    return Openings(training, len(prefix), notes), Openings(held_out, len(prefix))


def _no_opening(side: str, ids: Sequence[Sequence[int]], distinct: int, max_tokens: int) -> str:
    """Why one side of the split is empty, and what helps."""
    long = sum(len(tokens) >= max_tokens for tokens in ids)
    if not long:
        return (
            f"none of the {len(ids)} texts has prompt_max_tokens={max_tokens} tokens, the longest has "
            f"{max(map(len, ids))}; lower prompt_max_tokens."
        )
    begin = (
        f"the {long} texts of at least prompt_max_tokens={max_tokens} tokens begin in {distinct} different "
        f"way{'s' if distinct > 1 else ''} only, so none is left as a {side} prompt"
    )
    if long > 2 * distinct:
        return f"{begin}: many begin alike; raise prompt_max_tokens until they differ, or cut off what they share."
    return f"{begin}; use more texts, or lower prompt_max_tokens where most are shorter ({len(ids) - long} are)."


def prompt_batch(
    openings: Openings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    step: int,
    batch_size: int,
    min_tokens: int,
    max_tokens: int,
    pad_token_id: int,
    seed: int,
) -> PromptBatch:
    """The global batch of prompts of `step`: a function of its arguments, so nothing needs saving to resume.

    Batches walk through permutations of the openings, one permutation an epoch; prompt lengths are uniform in
    [min_tokens, max_tokens], the tokens before every text not counted.
    """
    first = step * batch_size
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in range(first // len(openings), (first + batch_size - 1) // len(openings) + 1):
        order = generator(seed, "prompt order", epoch).permutation(len(openings))
        positions = np.arange(first, first + batch_size) - epoch * len(openings)
        inside = (positions >= 0) & (positions < len(openings))
        indices[inside] = order[positions[inside]]
    lengths = generator(seed, "prompt lengths", step).integers(min_tokens, max_tokens + 1, batch_size)
    lengths += openings.prefix_tokens
    return pad_prompts(openings.tokens[torch.from_numpy(indices)], torch.from_numpy(lengths), tokenizer, pad_token_id)


def pad_prompts(
    openings: Tensor, lengths: Tensor, tokenizer: PreTrainedTokenizerBase, pad_token_id: int
) -> PromptBatch:
    """Left-pad the first `lengths` (N,) tokens of `openings` (N, P)."""
    width = openings.shape[1]
    source = torch.arange(width) - (width - lengths).unsqueeze(1)  # (N, P) column each place is filled from
    mask = source >= 0
    tokens = openings.gather(1, source.clamp_min(0)).masked_fill(~mask, pad_token_id)
    text = [prompt_text(tokenizer, row[keep]) for row, keep in zip(tokens, mask, strict=True)]
    return PromptBatch(tokens, mask, text)
