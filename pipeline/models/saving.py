"""Saving what was trained so that plain transformers or PEFT load it."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pipeline.config import RolloutSettings
from pipeline.models.forward import causal_lm
from pipeline.models.policy import Policy
from pipeline.models.vocabulary import as_list, eos_token_ids

VALUE_HEAD_FILE = "value_head.safetensors"


def save_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    rollout: RolloutSettings,
    *,
    step: int,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the value head, which says after which PPO step it was, beside what `save_causal_lm` writes.

    `weights` is the policy's state dict where workers share it (`full_state_dict`); by default its own.
    """
    weights = policy.state_dict() if weights is None else weights

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}

    save_causal_lm(policy.model, tokenizer, directory, rollout, part("model."))
    head = {name: tensor.cpu().contiguous() for name, tensor in part("value_head.").items()}
    save_file(head, directory / VALUE_HEAD_FILE, metadata={"step": str(step)})


def saved_step(directory: Path) -> int | None:
    """After which PPO step the policy in `directory` was saved; None where that is not known."""
    if not (directory / VALUE_HEAD_FILE).is_file():
        return None
    with safe_open(directory / VALUE_HEAD_FILE, "pt") as file:
        step = (file.metadata() or {}).get("step")
    return None if step is None else int(step)


def forget_policy(directory: Path) -> None:
    """Remove the weights that `save_policy` wrote."""
    for file in directory.glob("*.safetensors"):
        file.unlink()


def save_causal_lm(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    rollout: RolloutSettings,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write model (or adapter), tokenizer and, as generation settings, how the run samples into `directory`.

    `weights` is the model's state dict, by default its own.

    `AutoModelForCausalLM.from_pretrained(directory)` loads it, and for LoRA
    `PeftModel.from_pretrained(base, directory)` does too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generation = GenerationConfig(
        do_sample=True,
        top_k=rollout.top_k,  # 0 is all, here and there
        top_p=rollout.top_p,
        temperature=rollout.temperature,
        min_new_tokens=rollout.eos_min_tokens or None,
        max_new_tokens=rollout.response_max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=saved_eos(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    # Saving the model saves its own settings too, and refuses where a checkpoint came with contradictory ones.
    causal_lm(model).generation_config = generation
    only_trained = {"selected_adapters": ["default"]} if hasattr(model, "peft_config") else {}
    model.save_pretrained(directory, state_dict=weights, **only_trained)
    generation.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def saved_eos(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | list[int]:
    """What ends a response, for the generation settings: as they had it, and what ends one besides, where it does."""
    before = getattr(getattr(causal_lm(model), "generation_config", None), "eos_token_id", None)
    ending = eos_token_ids(model, tokenizer)
    if set(ending) <= set(as_list(before)):
        return before
    return ending[0] if len(ending) == 1 else list(ending)


def load_value_head(policy: Policy, directory: Path) -> None:
    """Load the value head that `save_policy` wrote."""
    policy.value_head.load_state_dict(load_file(directory / VALUE_HEAD_FILE))
