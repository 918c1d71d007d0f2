"""On what a run ran: hardware, versions and command, written down while it runs, in `environment.json`."""

import json
import os
import platform
import shlex
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from pipeline.foreign_text import shown, without_secrets
from pipeline.runtime.gpus import cuda_is_usable

ENVIRONMENT_FILE = "environment.json"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "datasets", "numpy")
ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, object]:
    """What can be said of this process and its node, as one part of `environment.json`."""
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(workers)))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda_is_usable() else []
    return {
        "started": _now(),
        "ended": None,
        "outcome": None,
        "command": without_secrets(shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])),
        "workers": workers,
        "nodes": max(1, workers // on_node),
        "device": "cuda" if gpus else "cpu",
        "threads_per_worker": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "cpu_cores": psutil.cpu_count(),
        "memory_gigabytes": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus,  # of this node
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "versions": {"project": _project_version(), "python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }


def begin_part(directory: Path, *, after_step: int | None = None) -> None:
    """Write this process's environment into the run's directory, as its first part or as a further one.

    Args:
        after_step: for a run that goes on: the steps that earlier parts of it have done.
    """
    parts = [] if after_step is None else read_parts(directory)
    _write(directory, [*parts, {"after_step": after_step or 0, **environment()}])


def end_part(directory: Path, outcome: str) -> None:
    """Note when and how the newest part ended."""
    parts = read_parts(directory)
    if parts:
        parts[-1] |= {"ended": _now(), "outcome": shown(outcome)}
        _write(directory, parts)


def read_parts(directory: Path) -> list[dict[str, object]]:
    """The parts of a run, oldest first; none where they were not recorded or cannot be read."""
    try:
        return json.loads((directory / ENVIRONMENT_FILE).read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _write(directory: Path, parts: list[dict[str, object]]) -> None:
    text = json.dumps({"parts": parts}, indent=2) + "\n"
    (directory / ENVIRONMENT_FILE).write_text(text, encoding="utf-8")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # with the build it is: +cpu, +cu130


def _project_version() -> str:
    if not (ROOT / "pyproject.toml").is_file():  # a copy of the package alone
        return "unknown"
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def _commit() -> str | None:
    """The git commit of the program, marked where files differ from it; None outside a checkout."""
    try:
        told = [
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True).stdout
            for command in (("rev-parse", "--show-toplevel"), ("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    top, commit, changed = (text.strip() for text in told)
    if Path(top) != ROOT:  # the checkout of something around the program
        return None
    return f"{commit}{' with changes' if changed else ''}"
