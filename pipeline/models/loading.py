"""Opening models and tokenizers with errors that name the value and the remedy."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from pipeline.errors import UserError
from pipeline.models.families import refusal
from pipeline.runtime.caches import cache_fault

ALL_LINEAR = "all-linear"
REFERENCE_ADAPTER = "reference"  # name of the frozen copy of the adapter a run starts from


class ModelError(UserError, ValueError):
    """A model cannot be used as asked; the message names the value and the remedy."""


@contextmanager
def opening(path: str, setting: str) -> Iterator[None]:
    """Turn what transformers raises on a bad path into one message that names the setting.

    Raises:
        ModelError: there is no such folder, and the Hub has no such name or cannot be reached; or what it sends cannot
            be kept in the cache.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        folder = Path(path)
        fault = cache_fault(error, Path(HF_HUB_CACHE), "HF_HUB_CACHE")
        if fault is not None:
            raise ModelError(f"{setting}={path!r} cannot be loaded: {fault}") from error
        if folder.is_dir():
            why = str(error).splitlines()[0]
        elif folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
            why = "there is no such folder"
        else:
            why = "there is no such folder, and the Hub has no such model or cannot be reached"
        raise ModelError(
            f"{setting}={path!r} cannot be opened: {why}. Give the folder of a saved model, or a Hub name that is "
            f"reachable or cached."
        ) from error


@contextmanager
def trying(model: nn.Module, path: str) -> Iterator[None]:
    """Turn what a model raises where it is first used into one message with its family's name.

    Raises:
        ModelError: it is of a family that is used in another way than causal LMs are.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the code of any family may raise anything
        raise ModelError(
            f"model_path={path!r}: {model.config.model_type} cannot be trained here: trying it raised "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]} docs/models.md has the families that can."
        ) from error


@dataclass(frozen=True)
class LoraSettings:
    """LoRA adapters on the policy; dropout is 0, as everywhere in PPO."""

    rank: int
    alpha: int
    target_modules: list[str] | None  # None: PEFT's choice for the architecture
    seed: int  # of the adapters' initial weights

    @property
    def modules(self) -> list[str] | str | None:
        """As PEFT wants them: what stands for all linear layers is a word of its own there."""
        return ALL_LINEAR if self.target_modules == [ALL_LINEAR] else self.target_modules


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; a missing pad token becomes EOS, which is safe because masks come from lengths.

    Raises:
        ModelError: it cannot be opened or has no EOS token.
    """
    with opening(path, "model_path"):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of model_path={path!r} has no EOS token, which ends a response.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(path: str) -> PreTrainedConfig:
    """The model's configuration, without its weights.

    Raises:
        ModelError: it cannot be opened, or is of a family that cannot be trained here.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"model_path={path!r} is a LoRA adapter; set adapter_path to it, use_peft to true, model_path to its base."
        )
    with opening(path, "model_path"):
        config = AutoConfig.from_pretrained(path)
    why = refusal(config)
    if why is not None:
        raise ModelError(f"model_path={path!r}: {config.model_type} cannot be trained here: it {why}. docs/models.md")
    return config


def check_context(config: PreTrainedConfig, prompt_tokens: int, response_tokens: int, prefix_tokens: int = 0) -> None:
    """Raise `ModelError` where prompt, the tokens before every text and response do not fit the model's context."""
    context = getattr(config, "max_position_embeddings", None)
    total = prefix_tokens + prompt_tokens + response_tokens
    if context is not None and total > context:
        before = f" and the {prefix_tokens} that the tokenizer puts before every text" if prefix_tokens else ""
        raise ModelError(
            f"prompt_max_tokens={prompt_tokens} and response_max_tokens={response_tokens}{before} make {total} tokens, "
            f"more than the model's context of {context}; lower one of them."
        )


def load_causal_lm(path: str) -> nn.Module:
    """A causal LM with float32 master weights, in evaluation mode: PPO wants no dropout anywhere.

    Raises:
        ModelError: it cannot be opened, is not a causal LM or of a family that is refused, or lacks weights.
    """
    load_config(path)
    with opening(path, "model_path"):
        model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    require_whole(found, f"model_path={path!r} is no whole causal LM")
    return model.eval()


def require_whole(found: Mapping[str, Sequence[str]], named: str) -> None:
    """Raise `ModelError` where weights were not in the files, so that transformers made random ones."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"{named}: its files lack {listed(missing)}, and random weights would stand there. Give the folder of a "
            f"model that was trained as what it is used for here."
        )


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def add_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """Wrap `model` with fresh LoRA adapters, the only weights left trainable.

    Their initial weights follow from the seed, so every worker and every repetition starts from the same ones.

    Raises:
        ModelError: PEFT knows no target modules for the architecture, or finds none of those named.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=settings.modules,
        fan_in_fan_out=model.config.model_type == "gpt2",  # its Conv1D keeps weights transposed
    )
    try:
        with torch.random.fork_rng(devices=[]):  # the weights are made on the CPU; no GPU's generator is touched
            torch.default_generator.manual_seed(settings.seed)
            return get_peft_model(model, config).eval()
    except ValueError as error:
        raise ModelError(
            f"lora_target_modules={settings.target_modules} does not fit {model.config.model_type}: {error}"
        ) from error
