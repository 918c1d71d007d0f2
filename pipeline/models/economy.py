"""Trading time for memory in the update, and a wait at the start for time."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import compile_regions
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.models.forward import trunk_of
from pipeline.models.loading import ModelError


def enable_recomputation(lm: nn.Module) -> None:
    """Let the blocks of a transformers model be `recomputing`.

    Raises:
        ModelError: its blocks do not support it.
    """
    if not any(isinstance(module, GradientCheckpointingLayer) for module in lm.modules()):
        raise ModelError(f"gradient_checkpointing=True: {type(lm).__name__} does not support it; leave it false.")
    lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def recomputing(lm: nn.Module) -> Iterator[None]:
    """A context in which a forward keeps of each block the input only, where `enable_recomputation` was called.

    transformers recomputes in training mode, which would turn dropout on; so the blocks alone, without the modules in
    them, are in it, and not while sampling, where they would drop the cache.
    """
    blocks = [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False


def compiled_trunk(lm: nn.Module) -> nn.Module:
    """The model's trunk with its blocks compiled for any number of rows and tokens; the weights are its own."""
    trunk = copy.copy(trunk_of(lm))
    trunk.__dict__["_modules"] = {  # the copy's alone; compiling what is around the blocks brings nothing
        name: compile_regions(child, dynamic=True) if isinstance(child, nn.ModuleList) else child
        for name, child in trunk_of(lm).named_children()
    }
    return trunk
