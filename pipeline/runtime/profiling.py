"""Where the time of a step goes, by operation: a trace to open in a browser and a table to read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

HEAVIEST = 10


@contextmanager
def profiled(directory: Path, step: int) -> Iterator[None]:
    """Profile what runs inside; write `step_<n>.json` (chrome://tracing, ui.perfetto.dev) and `step_<n>.txt`.

    Args:
        directory: made when missing.
        step: the PPO step, from 1, as metrics count.
    """
    activities = [ProfilerActivity.CPU]
    sort_by = "self_cpu_time_total"
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        sort_by = "self_cuda_time_total"
    with profile(activities=activities, record_shapes=True) as measured:
        yield
    directory.mkdir(parents=True, exist_ok=True)
    measured.export_chrome_trace(str(directory / f"step_{step}.json"))
    table = measured.key_averages().table(sort_by=sort_by, row_limit=HEAVIEST, max_name_column_width=60)
    (directory / f"step_{step}.txt").write_text(table + "\n", encoding="utf-8")
