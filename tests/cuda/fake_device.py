"""A fake CUDA device: tensors that report `cuda:0` as their device and compute on the CPU.

With it a CPU build of torch, on a machine without a GPU, runs the code that a GPU would run: the branches for `cuda`,
its autocast, autograd with backward, and Accelerate's placement. What CUDA refuses is refused here too: tensors of two
devices in one operation, and a copy or synchronization while a graph is captured. A `Ledger` counts operations, copies,
and how often the host would have waited. Times, memory and rounding are the CPU's.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_attention import KERNELS
from fake_graph import FakeGraph, bare, mapped, tensors
from ledger import Ledger, caller
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = Path(__file__).with_name("guard.cpp")
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Their result's value or shape is needed on the host, which waits for everything queued before.
ASK_THE_DEVICE = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "item", "masked_select", "nonzero",
    "repeat_interleave", "unique_consecutive", "unique_dim",
}  # fmt: skip
LAUNCH_NOTHING = {
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "new_empty", "new_empty_strided", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "squeeze_", "t", "transpose", "unbind", "unsqueeze", "unsqueeze_", "view",
}  # fmt: skip
INDEX = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}


class FakeCudaTensor(torch.Tensor):
    """A tensor on the fake device; `on_cpu` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=CUDA,
        )

    def __init__(self, on_cpu: torch.Tensor):
        self.on_cpu = on_cpu

    def __repr__(self, **_kwargs):
        return f"FakeCudaTensor({self.on_cpu})"

    def tolist(self):  # torch refuses it for subclasses
        return self.cpu().tolist()

    def data_ptr(self):
        return self.on_cpu.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return DEVICE.run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Intercepts the operations that make the first tensor on the device: none of their arguments is on it yet."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return DEVICE.run(func, args, kwargs or {})


class FakeDevice:
    """Runs the operations on the device's tensors, one by one."""

    def __init__(self):
        self.ledger = Ledger()
        self.graph: FakeGraph | None = None  # that is being captured

    def run(self, func, args: tuple, kwargs: dict):
        """Compute an operation on the CPU and count it; refuse it where CUDA would."""
        name = func._schema.name.split("::")[1]
        given = tensors(*args, *kwargs.values())
        mine = [x for x in given if isinstance(x, FakeCudaTensor)]
        asked = kwargs.get("device")
        stays = bool(mine) if asked is None else torch.device(asked).type == "cuda"  # the result is on the device
        if name == "is_pinned":
            return False
        if name == "_pin_memory":
            return args[0].clone()
        if not mine and not stays:
            return func(*args, **kwargs)
        self._book(func, name, args, kwargs, given, mine, stays)
        func = KERNELS.get(name, func)
        if asked is not None:
            kwargs = kwargs | {"device": CPU}
        result = func(*mapped(bare, args), **mapped(bare, kwargs))
        if self.graph is not None:
            self.graph.launches[name] += name not in LAUNCH_NOTHING
            self.graph.record(func, args, kwargs, result)
        known = {id(x): x for x in given} | {id(x.on_cpu): x for x in mine}

        def outside(x):
            if id(x) in known or not isinstance(x, torch.Tensor):
                return known.get(id(x), x)
            return FakeCudaTensor(x) if stays else x

        return mapped(outside, result)

    def _book(self, func, name, args, kwargs, given, mine, stays) -> None:
        others = [x for x in given if not isinstance(x, FakeCudaTensor)]
        if name in ("_to_copy", "copy_"):
            source = args[name == "copy_"]
            to_device = isinstance(args[0], FakeCudaTensor) if name == "copy_" else stays
            if to_device != isinstance(source, FakeCudaTensor):
                at_once = not to_device or not (kwargs.get("non_blocking") or any(args[2:]))
                (self.wait if at_once else self.copy)(f"{name} to {'the device' if to_device else 'the host'}")
                return
        elif name in INDEX:
            indices = [x for x in args[1] if x is not None]
            fills = len(args) > 2 and args[2].numel() == 1 and args[2].device.type == "cpu"  # which needs no positions
            if not all(isinstance(x, FakeCudaTensor) for x in indices):
                self.wait(f"{name} by indices of the host")
            elif any(x.dtype == torch.bool for x in indices) and not fills:
                self.wait(f"{name} by a mask")
            others = [x for x in others if not any(x is index for index in indices)]
        elif name in ASK_THE_DEVICE:
            self.wait(name)
        # Elementwise kernels take a single number from the host with their launch.
        takes_numbers = torch.Tag.pointwise in func.tags or name.endswith("fill_") or name in INDEX
        wrong = [x for x in others if x.ndim > 0 or not takes_numbers]
        if wrong and mine:
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} of cuda:0 and {wrong[0].device}")
        if name not in LAUNCH_NOTHING:
            self.ledger.launch(name)

    def wait(self, operation: str) -> None:
        """The host waits for the device."""
        self._not_captured(operation)
        self.ledger.wait(operation)

    def copy(self, operation: str) -> None:
        """The host sends something, and goes on."""
        self._not_captured(operation)
        self.ledger.copy(operation)

    def _not_captured(self, operation: str) -> None:
        if self.graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operation} at {caller()}")

    @contextmanager
    def capturing(self, graph: FakeGraph) -> Iterator[None]:
        """Stands in for `torch.cuda.graph`. Unlike there, what is captured is also computed."""
        self.graph = graph
        try:
            yield
        finally:
            self.graph = None
            graph.end()
        self.ledger.graphs.append(graph)


DEVICE = FakeDevice()


@cache
def compiled_guard() -> ctypes.CDLL:
    """guard.cpp, compiled and loaded; skips the calling test, with the reason, where that cannot be."""
    if torch.backends.cuda.is_built():
        pytest.skip("the fake CUDA device needs a CPU build of torch: this one has CUDA, which it would displace")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("the fake CUDA device needs a C++ compiler: install g++, or set CXX to one")
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/guard.so"
        paths = [f"-I{root}/include", str(GUARD), "-o", library, f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run([compiler, "-shared", "-fPIC", "-std=c++20", *paths], check=True)
        return ctypes.CDLL(library)


@contextmanager
def fake_cuda() -> Iterator[Ledger]:
    """A context in which torch finds one CUDA device; yields its ledger."""
    guard = compiled_guard()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        _stand_in(patch)
        patch.setattr(DEVICE, "ledger", Ledger())
        torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied when a model is moved
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([...], device=) copies visibly
        guard.set_present(True)
        try:
            with _Mode(), torch.autograd.set_multithreading_enabled(False):  # no thread of autograd's own
                yield DEVICE.ledger
        finally:
            guard.set_present(False)
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_swap_module_params_on_conversion(swaps)


def _stand_in(patch: pytest.MonkeyPatch) -> None:
    """Give `torch.cuda` what a CPU build lacks; its own Python code, and what that refuses, stays."""
    stream = SimpleNamespace(wait_stream=lambda _other: None, synchronize=lambda: DEVICE.wait("stream.synchronize"))
    stand_ins = {
        "_exchange_device": lambda _index: 0,
        "_lazy_init": lambda: None,
        "_maybe_exchange_device": lambda _index: 0,
        "CUDAGraph": FakeGraph,
        "Stream": lambda *_args, **_kwargs: stream,
        "current_device": lambda: 0,
        "current_stream": lambda _device=None: stream,
        "device_count": lambda: 1,
        "get_device_capability": lambda _device=None: (9, 0),
        "get_rng_state": lambda _device=None: torch.get_rng_state(),
        "graph": lambda graph, **_kwargs: DEVICE.capturing(graph),
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_args, **_kwargs: True,
        "max_memory_allocated": lambda _device=None: 0,
        "mem_get_info": lambda _device=None: (2**30, 2**30),
        "set_rng_state": lambda _state, _device=None: None,
        "set_stream": lambda _stream: None,
        "stream": lambda _stream: nullcontext(),
        "synchronize": lambda _device=None: DEVICE.wait("synchronize"),
    }
    for name, value in stand_ins.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch._C, "_cuda_setDevice", lambda _index: None, raising=False)
    patch.setattr(torch.utils._foreach_utils, "_foreach_supported_types", [torch.Tensor, FakeCudaTensor])
    run = threading.Thread.run

    def run_in_mode(thread: threading.Thread) -> None:  # modes belong to one thread
        with _Mode():
            run(thread)

    patch.setattr(threading.Thread, "run", run_in_mode)
