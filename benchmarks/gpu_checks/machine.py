"""What the machine is, and whether PyTorch, Accelerate and launch.sh see it as it is."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_checks.context import Context
from benchmarks.gpu_checks.processes import ROOT
from benchmarks.gpu_checks.runs import fresh_accelerate
from benchmarks.gpu_checks.timing import device_work, profiled_events
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.overlap import alongside

TF32_VARIABLES = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE")


def versions(context: Context) -> None:
    """Versions, and what decides how float32 is multiplied."""
    context.measure(
        torch=torch.__version__,
        float32_matmul_precision=torch.get_float32_matmul_precision(),
        tf32={"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        tf32_environment={name: os.environ.get(name) for name in TF32_VARIABLES},
    )
    if context.on_gpu("CUDA, driver, cuDNN, NCCL and the GPU's capability"):
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        context.measure(
            cuda=torch.version.cuda,
            driver=_driver(),
            cudnn=torch.backends.cudnn.version(),
            nccl=list(torch.cuda.nccl.version()),
            gpus=[{"name": g.name, "capability": [g.major, g.minor], "gigabytes": g.total_memory / 1e9} for g in gpus],
        )
        context.require("PyTorch computes on it", _computes())


def _driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def _computes() -> bool:
    one = torch.ones(8, 8, device="cuda")
    return bool((one @ one == 8).all().item())


def accelerator(context: Context) -> None:
    """Accelerate's device, with or without an index, serves the thread that scores; float32 stays float32."""
    with fresh_accelerate():
        device = make_accelerator("no").device
        context.measure(device=str(device), float32_matmul_precision=torch.get_float32_matmul_precision())
        context.require("Accelerate's device is the one asked for", device.type == context.device)
        for one in (device, torch.device(device.type, 0)):
            found = alongside(one, lambda one=one: torch.ones(3, device=one).sum().item())()
            context.require(f"work alongside {one}", found == 3)
        rows = torch.rand(context.sized(4096, 64), 16, device=device) + 1  # few products: TensorFloat-32 would show
        error = ((rows @ rows.T).double() / (rows.double() @ rows.double().T) - 1).abs().max().item()
        context.require_below("relative error of a float32 product", error, 1e-5)


def launcher(context: Context) -> None:
    """launch.sh starts a worker for each GPU, in bfloat16 where all of them have it."""
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(
        ["./launch.sh", "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50
    )
    context.measure(output=(done.stdout + done.stderr).strip())
    context.require("launch.sh --dry-run ends well", done.returncode == 0)
    words = shlex.split(done.stdout)
    options = {name: words[words.index(name) + 1] for name in ("--num_processes", "--mixed_precision") if name in words}
    gpus = torch.cuda.device_count()
    workers = context.sized(gpus, 2)
    context.require(f"it starts {workers} workers", options.get("--num_processes") == str(workers))
    if context.on_gpu("bf16 by the GPUs' capability"):
        able = all(torch.cuda.get_device_capability(i) >= (8, 0) for i in range(gpus))
        expected = ("bf16",) if able else ("no", None)
        context.require(f"its precision is {expected[0]}", options.get("--mixed_precision") in expected)
    else:
        able = any(word in Path("/proc/cpuinfo").read_text() for word in ("avx512_bf16", "amx_bf16"))
        context.require("its precision is the CPU's", (options.get("--mixed_precision") == "bf16") == able)


def attention_backends(context: Context) -> None:
    """Which kernels attention runs on, forward and backward, as make_accelerator leaves PyTorch."""
    with fresh_accelerate():
        make_accelerator("no")
        context.measure(cudnn_enabled=torch.backends.cuda.cudnn_sdp_enabled())
        for dtype in (torch.bfloat16, torch.float32):
            for case in ("packed", "one query", "no mask"):
                where = f"{case}, {str(dtype).removeprefix('torch.')}"
                attend = _attention(context, dtype, case)
                attend()
                names = {name for name, *_ in device_work(context.device, profiled_events(context.device, attend)[0])}
                fused = sorted(n for n in names if any(part in n.lower() for part in ("fmha", "flash", "cudnn")))
                context.measure(**{where: fused or "products and softmax"})
                context.require(f"no cuDNN plan for each shape: {where}", not any("cudnn" in n.lower() for n in names))
    context.on_gpu("the choice among CUDA's attention kernels")


def _attention(context: Context, dtype: torch.dtype, case: str) -> Callable[[], None]:
    rows, heads, width, size = context.sized((16, 12, 200, 64), (2, 4, 20, 8))
    queries = 1 if case == "one query" else width
    query = torch.randn(rows, heads, queries, size, device=context.device, dtype=dtype, requires_grad=True)
    key, value = torch.randn(2, rows, heads, width, size, device=context.device, dtype=dtype).unbind()
    mask = torch.ones(rows, 1, queries, width, dtype=torch.bool, device=context.device).tril(width - queries)
    given = {"is_causal": True} if case == "no mask" else {"attn_mask": mask}
    return lambda: scaled_dot_product_attention(query, key, value, **given).sum().backward()
