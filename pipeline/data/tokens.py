"""From texts to a model's tokens and back: what its tokenizer puts before every text, and what rewards read."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids the tokenizer itself puts before every text: BOS for Llama and Gemma, none for GPT-2 and Qwen.

    What it puts after a text (EOS, SEP) is not among them.
    """
    added = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    special = added["special_tokens_mask"]
    return tuple(added["input_ids"][: special.index(0) if 0 in special else 0])


def start_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What stands before a response that has no prompt: the prefix; without one BOS, or EOS as in GPT-2's texts."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return prefix_ids(tokenizer) or (first,)


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text without the prefix, also where a text spells the prefix out, so that it never comes twice.

    Other special tokens that a text spells out become those tokens, as the tokenizer reads them.
    """
    prefix = list(prefix_ids(tokenizer))
    found = tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return [ids[len(prefix) :] if prefix and ids[: len(prefix)] == prefix else ids for ids in found]


def prompt_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | Tensor) -> str:
    """A prompt as rewards read it: no special tokens, and no last character of which the ids hold only the first bytes.

    Those bytes belong to the response's text, so that both together are the decoding of all tokens.
    """
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
