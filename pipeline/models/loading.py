"""Opening models and tokenizers with errors that name the value and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from pipeline.errors import UserError
from pipeline.runtime.caches import cache_fault

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
    except (OSError, ValueError) as error:
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


@dataclass(frozen=True)
class LoraSettings:
    """LoRA adapters on the policy; dropout is 0, as everywhere in PPO."""

    rank: int
    alpha: int
    target_modules: list[str] | None  # None: PEFT's choice for the architecture
    seed: int  # of the adapters' initial weights


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


def first_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What a text begins with where nothing stands before it: BOS, or EOS as in GPT-2's training texts."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def load_config(path: str) -> PreTrainedConfig:
    """The model's configuration, without its weights; raises `ModelError`."""
    folder = Path(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"model_path={path!r} is a LoRA adapter; set adapter_path to it, use_peft to true, model_path to its base."
        )
    with opening(path, "model_path"):
        return AutoConfig.from_pretrained(path)


def check_context(config: PreTrainedConfig, prompt_tokens: int, response_tokens: int) -> None:
    """Raise `ModelError` where prompt and response do not fit the model's context."""
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and prompt_tokens + response_tokens > context:
        raise ModelError(
            f"prompt_max_tokens={prompt_tokens} and response_max_tokens={response_tokens} make "
            f"{prompt_tokens + response_tokens} tokens, more than the model's context of {context}; lower one of them."
        )


def load_causal_lm(path: str) -> nn.Module:
    """A causal LM with float32 master weights, in evaluation mode: PPO wants no dropout anywhere.

    Raises:
        ModelError: it cannot be opened or is not a causal LM.
    """
    with opening(path, "model_path"):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def continue_lora(model: nn.Module, path: str) -> nn.Module:
    """Wrap `model` with the adapter at `path` twice: "default" goes on training, "reference" stays as it is.

    Raises:
        ModelError: there is no adapter, or it does not fit the model.
    """
    with opening(path, "adapter_path"):
        try:
            wrapped = PeftModel.from_pretrained(model, path, is_trainable=True)
            wrapped.load_adapter(path, REFERENCE_ADAPTER)
        except RuntimeError as error:
            raise ModelError(f"adapter_path={path!r} does not fit the model: {str(error).splitlines()[0]}") from error
    wrapped.set_adapter("default")
    return wrapped.eval()


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
        target_modules=settings.target_modules,
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
