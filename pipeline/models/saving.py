"""Saving what was trained so that plain transformers or PEFT load it."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pipeline.models.forward import causal_lm
from pipeline.models.policy import Policy

VALUE_HEAD_FILE = "value_head.safetensors"


def save_policy(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, directory: Path, *, max_new_tokens: int, temperature: float
) -> None:
    """Write the value head beside what `save_causal_lm` writes."""
    save_causal_lm(policy.model, tokenizer, directory, max_new_tokens=max_new_tokens, temperature=temperature)
    head = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.value_head.state_dict().items()}
    save_file(head, directory / VALUE_HEAD_FILE)


def save_causal_lm(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path, *, max_new_tokens: int, temperature: float
) -> None:
    """Write model (or adapter), tokenizer and generation settings into `directory`.

    `AutoModelForCausalLM.from_pretrained(directory)` loads it, and for LoRA
    `PeftModel.from_pretrained(base, directory)` does too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generation = GenerationConfig(
        do_sample=True,
        top_k=0,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Saving the model saves its own settings too, and refuses where a checkpoint came with contradictory ones.
    causal_lm(model).generation_config = generation
    only_trained = {"selected_adapters": ["default"]} if hasattr(model, "peft_config") else {}
    model.save_pretrained(directory, **only_trained)
    generation.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def load_value_head(policy: Policy, directory: Path) -> None:
    """Load the value head that `save_policy` wrote."""
    policy.value_head.load_state_dict(load_file(directory / VALUE_HEAD_FILE))
