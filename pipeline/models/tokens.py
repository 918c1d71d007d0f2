"""What a model's texts begin and end with: the tokens before every text, and those of which any ends a response."""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from pipeline.models.forward import causal_lm
from pipeline.models.loading import ModelError


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


def eos_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a response: those of the generation settings, the tokenizer and the configuration.

    Ids outside the vocabulary, which nobody can draw, are left out.
    """
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    stated = (getattr(getattr(lm, "generation_config", None), "eos_token_id", None), tokenizer.eos_token_id,
              config.eos_token_id)  # fmt: skip
    found = [id for ids in stated for id in as_list(ids) if 0 <= id < config.vocab_size]
    return tuple(dict.fromkeys(found))


def as_list(ids: int | Sequence[int] | None) -> list[int]:
    """Ids as configurations state them: one, several or none."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, named: str) -> None:
    """Raise `ModelError` where the tokenizer has ids that the model's embedding has not; `named` says whose they are."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size is not None and needed > size:
        raise ModelError(
            f"{named}: its tokenizer has ids up to {needed - 1}, {needed} tokens, and its embedding only {size}: one of "
            f"them is another model's. Use the model's own tokenizer, or enlarge the embedding "
            f"(resize_token_embeddings({needed})) and train it."
        )
