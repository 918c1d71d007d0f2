"""What a PPO step has to do, and what the machine could do: the arithmetic of the benchmarks.

Only matrix products of weights are counted: 2 operations a weight and position, in the trunk at every position and in
the head at response positions. A step needs of each sample one forward to sample, one of the reference and, for each
epoch, a forward and a backward of two: 14 forwards with four epochs. Attention's own products are left out.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

ROOT = Path(__file__).resolve().parents[1]
# What launch.sh sets for a CPU: glibc keeps large tensors instead of handing them back after each operation.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def under_launch_settings() -> None:
    """Start this process again with launch.sh's memory settings where it lacks them; glibc reads them at the start."""
    if MALLOC.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **MALLOC})


def forward_flops(model: nn.Module, prompt: int, response: int) -> float:
    """Operations of one sample's forward: trunk at all positions, head at the response's."""
    head = model.get_output_embeddings()
    trunk = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head)
    return 2.0 * trunk * (prompt + response) + 2.0 * head.weight.numel() * response


def decode_bytes(model: nn.Module, batch: int, prompt: int, response: int, dtype: torch.dtype) -> float:
    """Bytes that sampling a batch has to read: for each token all weights once, and the keys and values so far."""
    config = model.config
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    position = 2 * config.num_hidden_layers * key_heads * head_size * batch
    weights = sum(p.numel() for p in model.parameters())
    return dtype.itemsize * sum(weights + position * (prompt + token) for token in range(response))


def best_seconds(action: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The shortest of several runs."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def product_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a large `torch.mm`."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / best_seconds(lambda: a @ b, 8, device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second read and written by a copy of a large tensor."""
    source = torch.randn(2**26 if device.type == "cpu" else 2**30, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / best_seconds(lambda: target.copy_(source), 5, device)


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def save_result(name: str, result: dict[str, object]) -> None:
    """Write benchmarks/results/NAME.json."""
    path = ROOT / "benchmarks/results" / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(ROOT)}")
