"""A stand-in for `torch.cuda.CUDAGraph` on the fake device: records operations and repeats them on the same memory."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes


def mapped(function, x):
    """Apply `function` to the leaves of nested tuples, lists and dictionaries; faster than torch's pytree."""
    kind = type(x)
    if kind is tuple or kind is list:
        return kind([mapped(function, item) for item in x])
    if kind is dict:
        return {name: mapped(function, item) for name, item in x.items()}
    return function(x)


def tensors(*items) -> list[torch.Tensor]:
    """The tensors in nested tuples and lists."""
    found = []
    for item in items:
        if type(item) is tuple or type(item) is list:
            found += tensors(*item)
        elif isinstance(item, torch.Tensor):
            found.append(item)
    return found


def bare(x):
    """The CPU tensor behind a tensor on the device; anything else unchanged."""
    return getattr(x, "on_cpu", x) if isinstance(x, torch.Tensor) else x


@dataclass(frozen=True)
class _Made:
    """The `number`th tensor that the graph itself creates."""

    number: int


class _Outside:
    """A tensor from outside the graph, which holds its address only and does not keep it alive."""

    def __init__(self, tensor: torch.Tensor):
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.place = tensor.storage_offset(), tensor.size(), tensor.stride()
        self.dtype = tensor.dtype

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError("a CUDA graph is replayed over memory that was freed")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class FakeGraph:
    """Repeats operations with the Python numbers that were there at the capture, as CUDA does."""

    def __init__(self):
        self.launches: Counter[str] = Counter()
        self.replays = 0
        self._operations: list[tuple] = []
        self._numbers: dict[int, _Made] = {}  # of the tensors made so far, by id, while they are kept alive
        self._alive: list[torch.Tensor] = []

    def record(self, func, args: tuple, kwargs: dict, result) -> None:
        """Record an operation. Its tensors are the graph's own, or stay where they are in memory."""
        given = {id(bare(x)) for x in tensors(*args, *kwargs.values())}
        spec = mapped(self._spec, args), mapped(self._spec, kwargs)
        made = []
        for place, x in enumerate(tensors(result)):
            if id(x) not in given:  # else an argument, changed in place
                self._alive.append(x)
                self._numbers[id(x)] = _Made(len(self._alive))
                made.append((place, self._numbers[id(x)]))
        self._operations.append((func, *spec, made))

    def _spec(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        if bare(x) is x:  # a constant from the host
            return x.clone()
        return self._numbers.get(id(bare(x))) or _Outside(bare(x))

    def end(self) -> None:
        """End the capture."""
        self._numbers.clear()
        self._alive.clear()

    def reset(self) -> None:
        self._operations.clear()

    def replay(self) -> None:
        self.replays += 1
        made: dict[_Made, torch.Tensor] = {}

        def found(x):
            return made[x] if type(x) is _Made else x.tensor() if type(x) is _Outside else x

        with _disable_current_modes():
            for func, args, kwargs, outputs in self._operations:
                results = tensors(func(*mapped(found, args), **mapped(found, kwargs)))
                made.update((number, results[place]) for place, number in outputs)
