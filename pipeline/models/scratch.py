"""A tokenizer and a model from scratch, in the shape of any architecture transformers knows."""

import re
from collections.abc import Sequence
from pathlib import Path

from transformers import (
    CONFIG_MAPPING,
    TOKENIZER_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from pipeline.models.loading import ModelError


def new_tokenizer(model_type: str, texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train the tokenizer an architecture uses (byte-level BPE for gpt2, uncased WordPiece for distilbert) on `texts`.

    Raises:
        ModelError: the architecture is unknown or has no tokenizer of its own, or the result does not reproduce words
            (transformers 5 builds an empty vocabulary without an error when given the wrong arguments).
    """
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in TOKENIZER_MAPPING:
        raise ModelError(f"model_type={model_type!r} has no tokenizer to train; gpt2 and distilbert do, for example.")
    blank = TOKENIZER_MAPPING[CONFIG_MAPPING[model_type]]()
    tokenizer = blank.train_new_from_iterator(texts, vocab_size, show_progress=False)
    probe = " ".join(re.findall("[a-z]+", texts[0].lower())[:8])
    if len(tokenizer) > vocab_size or tokenizer.decode(tokenizer(probe, add_special_tokens=False).input_ids) != probe:
        raise ModelError(f"the tokenizer trained for {model_type!r} ({len(tokenizer)} tokens) does not round-trip.")
    return tokenizer


def tokenizer_of_run(
    run: TrainingArguments, model_type: str, texts: Sequence[str], vocab_size: int
) -> PreTrainedTokenizerBase:
    """The tokenizer of a training from scratch: trained once, by rank zero, and kept in the run's directory.

    Two trainings on the same texts number some tokens differently (ties are broken by the process), so a resumed run
    or a second worker that trained its own would read the weights with other ids.
    """
    folder = Path(run.output_dir) / "tokenizer"
    with run.main_process_first(local=False):
        folder.mkdir(parents=True, exist_ok=True)
        if run.process_index == 0 and get_last_checkpoint(run.output_dir) is None:
            new_tokenizer(model_type, texts, vocab_size).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("is_local", "local_files_only"):  # where it was read from is nothing to save with it
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def new_config(model_type: str, overrides: str | None, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Return the architecture's configuration with `overrides` ("n_layer=6,n_embd=256") and the tokenizer's ids.

    Raises:
        ModelError: an override that the configuration does not have.
    """
    config = CONFIG_MAPPING[model_type]()
    try:
        if overrides:
            config.update_from_string(overrides)
    except ValueError as error:
        raise ModelError(f"config_overrides={overrides!r}: {error}") from error
    config.vocab_size = len(tokenizer)
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return config
