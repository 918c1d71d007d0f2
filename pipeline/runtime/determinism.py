"""Gradients that are the same bits each time on CUDA, where PyTorch has a way; on a CPU they are by themselves.

Only the update is run so. PyTorch refuses the sums that sampling draws by in this mode, and they need no gradient.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def reserve_workspace() -> None:
    """Let cuBLAS repeat itself, unless the user has set its workspace; to be called before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """A context in which operations on a GPU give the same bits each time; on a CPU nothing changes.

    Only warning of those that cannot would not do: attention's backward would then stay as it is.

    Raises:
        RuntimeError: inside, from an operation that has no deterministic way; its message says "determinis…".
    """
    if device.type != "cuda":
        yield
        return
    mode, fills = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over each new tensor, to find faults by
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fills
