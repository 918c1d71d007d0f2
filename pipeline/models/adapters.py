"""LoRA adapters from files: each tensor where it belongs, or an error that names what is missing."""

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from torch import nn

from pipeline.models.loading import REFERENCE_ADAPTER, ModelError, listed, opening


def continue_lora(model: nn.Module, path: str) -> nn.Module:
    """Wrap `model` with the adapter at `path` twice: "default" goes on training, "reference" stays as it is.

    Raises:
        ModelError: there is no adapter, or it does not fit the model.
    """
    wrapped = load_lora(model, path, "adapter_path", is_trainable=True)
    add_saved(wrapped, path, "adapter_path", REFERENCE_ADAPTER)
    wrapped.set_adapter("default")
    return wrapped.eval()


def load_lora(model: nn.Module, path: str, setting: str, *, is_trainable: bool = False) -> PeftModel:
    """Wrap `model` with the saved adapter at `path`; `setting` names it in messages.

    Raises:
        ModelError: there is no adapter, it is of another kind than LoRA, or it does not fit the model.
    """
    with opening(path, setting):
        config = PeftConfig.from_pretrained(path)
        if config.peft_type != PeftType.LORA:
            raise ModelError(
                f"{setting}={path!r} is a {config.peft_type} adapter; only LoRA adapters are trained here."
            )
        if config.bias != "none":
            raise ModelError(
                f"{setting}={path!r} changes the model's biases too (bias={config.bias!r}), which stay changed where "
                f"the adapter is off: the reference would not be the base. Use an adapter with bias='none'."
            )
        config.inference_mode = not is_trainable
        with torch.random.fork_rng(devices=[]):  # the fresh weights are written over
            wrapped = get_peft_model(model, config)
    add_saved(wrapped, path, setting, "default", is_trainable=is_trainable)
    return wrapped


def add_saved(wrapped: PeftModel, path: str, setting: str, name: str, *, is_trainable: bool = False) -> None:
    """Load the adapter at `path` into `wrapped` under `name`.

    Raises:
        ModelError: tensors are missing, of another shape, or belong nowhere; or one is not finite.
    """
    with opening(path, setting):
        try:
            found = wrapped.load_adapter(path, name, is_trainable=is_trainable)
        except RuntimeError as error:
            lines = str(error).splitlines()
            mismatch = next((line.strip() for line in lines if "size mismatch" in line), lines[0])
            raise ModelError(f"{setting}={path!r} does not fit the model: {mismatch}") from error
    faults = []
    if found.missing_keys:
        faults.append(f"it lacks {listed(found.missing_keys)}")
    if found.unexpected_keys:
        faults.append(f"the model has no place for {listed(found.unexpected_keys)}")
    if faults:
        raise ModelError(f"{setting}={path!r} does not fit the model: {'; '.join(faults)}.")
