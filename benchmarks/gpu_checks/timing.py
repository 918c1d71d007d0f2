"""Seconds of work on a device, and the launches and kernels in it."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile


def synchronize(device: str | torch.device) -> None:
    """Wait for a GPU; a CPU is done already."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(device: str | torch.device, action: Callable[[], object]) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(device: str | torch.device, action: Callable[[], object], repeats: int) -> float:
    """Median of several calls after one that warms up."""
    seconds(device, action)
    return statistics.median(seconds(device, action) for _ in range(repeats))


def profiled_events(device: str | torch.device, action: Callable[[], object]) -> tuple[list, float]:
    """The profiler's events of one call, and its seconds."""
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as measured:
        spent = seconds(device, action)
    return list(measured.events()), spent


def device_work(device: str | torch.device, events: Sequence) -> list[tuple[str, float, float]]:
    """(name, start, end) in seconds of the kernels and copies on a GPU; of the operations, on a CPU."""
    wanted = torch.autograd.DeviceType.CUDA if torch.device(device).type == "cuda" else torch.autograd.DeviceType.CPU
    return [
        (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in events
        if event.device_type == wanted and not event.is_user_annotation  # a name for a span is no work
    ]


def busy_seconds(work: Sequence[tuple[str, float, float]]) -> float:
    """Seconds in which at least one piece of work runs."""
    total, until = 0.0, float("-inf")
    for _name, start, end in sorted(work, key=lambda piece: piece[1]):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
