"""CUDA graphs of the step that makes one token: its some four hundred kernels started by one call."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipeline.models.forward import adapter_state

if TYPE_CHECKING:
    from pipeline.rollout.decoding import _Steps

GRAPHED = "cuda"  # the type of device that has graphs


@dataclass
class _Entry:
    steps: "_Steps"
    graph: torch.cuda.CUDAGraph | None = None
    addresses: tuple[int, ...] = ()  # of the weights, when it was captured


class DecodeGraphs:
    """Graphs of decoding steps, kept from rollout to rollout: one for each model, precision, adapter and shape.

    A graph reads the weights where they lie, so it stays right as long as they are updated in place. Where they have
    moved, or a model cannot be captured, the plain loop decodes from then on; that is warned of once, and `failure`
    says why.
    """

    def __init__(self, failure: str | None = None):
        """
        Args:
            failure: why there is to be no graph, where that is known beforehand.
        """
        self.failure = failure
        self._said = False
        self._entries: dict[tuple[object, ...], _Entry] = {}

    def find(self, steps: "_Steps") -> "_Steps":
        """The buffers that a graph of such steps works on, where there is one; else `steps`, for a graph to come."""
        if self.failure is not None or not steps.fixed or steps.tokens.device.type != GRAPHED:
            return steps
        entry = self._entries.setdefault(_key(steps), _Entry(steps))
        if entry.graph is not None and entry.addresses != _addresses(steps):
            self._give_up("the weights have moved since the graph was captured")
            return steps
        return entry.steps

    def captured(self, steps: "_Steps") -> Callable[[], object]:
        """What makes one step of what `find` gave: the graph's replay, or the step itself.

        Raises:
            torch.OutOfMemoryError: there is no room for the graph; all graphs are freed.
        """
        if steps.tokens.device.type != GRAPHED:
            return steps.step
        if self.failure is None and not steps.fixed:
            self._give_up("the model's cache or mask has no fixed shape")
        if self.failure is None:
            entry = self._entries[_key(steps)]
            if entry.graph is None:
                try:
                    entry.graph, entry.addresses = _capture(steps), _addresses(steps)
                except RuntimeError as error:
                    self._give_up(str(error.__context__ or error).splitlines()[0])
                    if _is_out_of_memory(error):
                        raise torch.OutOfMemoryError(self.failure) from error
        if self.failure is None:
            return entry.graph.replay
        if not self._said:
            warnings.warn(f"sampling without a CUDA graph, more slowly: {self.failure}", stacklevel=3)
        self._said = True
        return steps.step

    def _give_up(self, why: str) -> None:
        self.failure = why
        self._entries.clear()


def _key(steps: "_Steps") -> tuple[object, ...]:
    """What a captured step depends on."""
    device = steps.tokens.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (*steps.shape, id(steps.model), id(steps.value_head), dtype, adapter_state(steps.model))


def _addresses(steps: "_Steps") -> tuple[int, ...]:
    modules = [steps.model] if steps.value_head is None else [steps.model, steps.value_head]
    return tuple(parameter.data_ptr() for module in modules for parameter in module.parameters())


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, also where ending the capture failed for it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__context__
    return False


def _capture(steps: "_Steps") -> torch.cuda.CUDAGraph:
    """Capture a step. Neither its warm-up nor a failure is to be seen in the buffers, which are put back."""
    state = steps.buffers()
    before = [tensor.clone() for tensor in state]

    def restore() -> None:
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    here, aside, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    device = steps.tokens.device.type
    # Autocast keeps what it has cast until its context ends: a graph would go on reading there.
    uncached = torch.autocast(
        device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device), cache_enabled=False
    )
    try:
        with uncached:
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(2):
                    steps.step()
                    restore()
            here.wait_stream(aside)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
                steps.step()
    except BaseException:
        torch.cuda.set_stream(here)  # a capture that cannot be ended leaves its own the current one
        with contextlib.suppress(RuntimeError):
            graph.reset()
        raise
    finally:
        restore()
    return graph
