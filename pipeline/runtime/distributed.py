"""The accelerator, and the few collectives the pipeline needs."""

import os
import resource
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor
from transformers.utils import logging as transformers_logging

from pipeline.errors import OtherWorkerError, UserError
from pipeline.runtime.determinism import reserve_workspace
from pipeline.runtime.engine import EngineError, adopt_deepspeed, precision
from pipeline.runtime.fsdp import adopt_fsdp
from pipeline.runtime.gpus import cuda_is_usable

T = TypeVar("T")


def make_accelerator(mixed_precision: str | None = None) -> Accelerator:
    """The accelerator for what `accelerate launch` set up: CUDA where there is any, else CPU over gloo.

    Args:
        mixed_precision: no, bf16 or fp16; None is what the launcher says.

    Raises:
        EngineError: fp16 on a CPU; and see `adopt_deepspeed` and `adopt_fsdp`.
        GpuError: a GPU is there that PyTorch cannot use.
        RuntimeError: not as many processes joined as launch.sh, or else the launcher, asked for.
    """
    reserve_workspace()
    on_cpu = not cuda_is_usable()
    if on_cpu:  # DeepSpeed looks for a GPU otherwise
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    launched = int(os.environ.get("PIPELINE_PROCESSES") or os.environ.get("WORLD_SIZE", "1"))
    group = InitProcessGroupKwargs(backend="gloo" if on_cpu else None, timeout=timedelta(minutes=30))
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"  # cpu=True would go around it
    if uses_deepspeed and on_cpu:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling; gloo does as well
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=on_cpu and not uses_deepspeed,
        kwargs_handlers=[group] if launched > 1 or uses_deepspeed else [],
    )
    adopt_deepspeed(accelerator)
    adopt_fsdp(accelerator)
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched, but this one sees {accelerator.num_processes}: check "
            f"distributed_type in the accelerate configuration (accelerate_configs/cpu.yaml is right for CPUs)."
        )
    if accelerator.device.type == "cpu" and precision(accelerator) == "fp16":  # Accelerate would compute in float32
        raise EngineError("mixed_precision='fp16' needs a GPU; on a CPU use bf16 or no.")
    if accelerator.device.type == "cuda":
        _settle_kernels(accelerator)
    if not accelerator.is_main_process:  # what there is to warn of, rank zero says as well
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
    return accelerator


def _settle_kernels(accelerator: Accelerator) -> None:
    """Choose among CUDA's ways to compute the ones that this project counts on."""
    # cuDNN's attention makes a plan for each new shape, of which packed rows have many, and has no deterministic
    # backward; the other fused ones have neither fault.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if precision(accelerator) == "no":  # NVIDIA's containers round float32 to TF32's 10 bits otherwise
        torch.set_float32_matmul_precision("highest")


def peak_memory_gigabytes(device: torch.device) -> float:
    """This process's peak so far, in 1e9 bytes: of tensors on CUDA, else of resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def free_memory_bytes(device: torch.device) -> float:
    """Memory that this worker may still take: of its GPU, else its part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def share(accelerator: Accelerator, total: int) -> slice:
    """This worker's part of `total` samples; `total` is a multiple of the number of workers."""
    size = total // accelerator.num_processes
    return slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)


def gather_fields(accelerator: Accelerator, local: T) -> T:
    """Gather each tensor of a dataclass along its first dimension, in the workers' order, onto every worker."""
    values = {item.name: getattr(local, item.name) for item in fields(local)}
    if accelerator.num_processes > 1:
        values = {name: accelerator.gather(value.contiguous()) for name, value in values.items()}
    return type(local)(**values)


def any_worker(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is true on any worker: the same answer on all of them."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device, dtype=torch.int32)).any())


def agreed_signal(accelerator: Accelerator, number: int) -> int:
    """The largest signal number any worker got (0: none), the same on all of them."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device, dtype=torch.int32)).max())


def agreed_minimum(accelerator: Accelerator, number: int) -> int:
    """The smallest of the workers' numbers, the same on all of them."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).min())


def all_or_none(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on every worker; where it raises a `UserError` on any of them, raise on all.

    The worker at fault raises its own error, the others `OtherWorkerError`, and nobody waits in a collective.
    """
    result, error = None, None
    try:
        result = action()
    except UserError as raised:
        error = raised
    if any_worker(accelerator, error is not None):
        raise error or OtherWorkerError("another worker failed; its message says how.")
    return result


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on rank zero and give its result to every worker; its `UserError` is raised on all."""
    result = all_or_none(accelerator, lambda: action() if accelerator.is_main_process else None)
    return broadcast_object_list([result])[0] if accelerator.num_processes > 1 else result


def reduce_stats(accelerator: Accelerator, sums: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
    """Add `sums` (S,) and take the largest of `maxima` (M,) over the workers."""
    if accelerator.num_processes == 1:
        return sums, maxima
    gathered = accelerator.gather(torch.cat([sums, maxima]).unsqueeze(0))
    return gathered[:, : len(sums)].sum(0), gathered[:, len(sums) :].amax(0)
