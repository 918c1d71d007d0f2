"""Policy and reference from a recipe's model settings."""

import torch

from pipeline.models.loading import LoraSettings, add_lora, load_causal_lm
from pipeline.models.policy import Policy, Reference


def build_policy_and_reference(
    path: str, *, lora: LoraSettings | None, device: torch.device | str
) -> tuple[Policy, Reference]:
    """Load the policy and the frozen model it starts from.

    Full fine-tuning loads the weights twice; LoRA once, and the reference is the policy with the adapter off.

    Raises:
        ModelError: see `load_causal_lm` and `add_lora`.
    """
    model = load_causal_lm(path)
    if lora is not None:
        model = add_lora(model, lora)
        reference = Reference(model)
    else:
        reference = Reference(load_causal_lm(path).requires_grad_(False).to(device))
    policy = Policy(model).eval().to(device)
    return policy, reference
