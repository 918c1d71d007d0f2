"""Policy and reference, fresh from a recipe's model settings or back from a finished run."""

from pathlib import Path

import torch

from pipeline.models.adapters import add_saved, continue_lora, load_lora
from pipeline.models.kernels import use_fast_kernels
from pipeline.models.loading import (
    REFERENCE_ADAPTER,
    LoraSettings,
    ModelError,
    add_lora,
    load_causal_lm,
    trying,
)
from pipeline.models.policy import Policy, Reference
from pipeline.models.saving import VALUE_HEAD_FILE, load_value_head


def build_policy_and_reference(
    path: str, *, lora: LoraSettings | None, adapter_path: str | None = None, device: torch.device | str
) -> tuple[Policy, Reference]:
    """Load the policy and the frozen model it starts from.

    Full fine-tuning loads the weights twice; LoRA once, and the reference is the policy with the adapter off, or with
    the adapter it starts from.

    Raises:
        ModelError: see `load_causal_lm`, `add_lora` and `continue_lora`.
    """
    model = use_fast_kernels(load_causal_lm(path), device)
    with trying(model, path):
        if adapter_path is not None:
            model = continue_lora(model, adapter_path)
        elif lora is not None:
            model = add_lora(model, lora)
        policy = Policy(model).eval().to(device)
        if adapter_path is None and lora is None:
            model = use_fast_kernels(load_causal_lm(path), device).requires_grad_(False).to(device)
        return policy, Reference(model)


def load_tuned(
    path: str, directory: Path, *, use_peft: bool, adapter_path: str | None = None, device: torch.device | str
) -> tuple[Policy, Reference]:
    """Load what `save_policy` wrote into `directory`, and the model at `path` it was trained from.

    Raises:
        ModelError: either cannot be opened, or `directory` holds no finished run.
    """
    if not (directory / VALUE_HEAD_FILE).is_file():
        raise ModelError(
            f"{str(directory)!r} holds no trained model (no {VALUE_HEAD_FILE}); give a finished run, or one of its "
            f"checkpoints: {directory}/checkpoints/step_…"
        )
    original = use_fast_kernels(load_causal_lm(path), device)
    if use_peft:
        model = load_lora(original, str(directory), "the adapter of the run").eval()
        if adapter_path is not None:
            add_saved(model, adapter_path, "adapter_path", REFERENCE_ADAPTER)
    else:
        model = use_fast_kernels(load_causal_lm(str(directory)), device)
        original = original.requires_grad_(False).to(device)
    with trying(model, path):
        policy = Policy(model, f"the policy of {directory}").eval()
        reference = Reference(model if use_peft else original)
    load_value_head(policy, directory)
    return policy.to(device), reference
