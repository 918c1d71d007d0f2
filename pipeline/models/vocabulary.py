"""A model and its tokenizer together: which ids end a response, and whether every id has an embedding."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from pipeline.models.forward import causal_lm
from pipeline.models.loading import ModelError, load_config, load_tokenizer


def load_config_and_tokenizer(path: str) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """All that can be known of a model before its weights are loaded.

    Raises:
        ModelError: see `load_config`, `load_tokenizer` and `check_vocabulary`.
    """
    config, tokenizer = load_config(path), load_tokenizer(path)
    check_vocabulary(tokenizer, config, f"model_path={path!r}")
    return config, tokenizer


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
    """Raise `ModelError` where the tokenizer has ids that the embedding has not; `named` says whose they are."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size is not None and needed > size:
        raise ModelError(
            f"{named}: its tokenizer has ids up to {needed - 1}, so {needed} tokens, and its embedding {size}: one "
            f"of them is another model's. Use the model's own tokenizer, or enlarge the embedding "
            f"(resize_token_embeddings({needed})) and train it."
        )
