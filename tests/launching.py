"""Starting the real commands the way a user's launcher does."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import STATUS_FILE_VARIABLE

ROOT = Path(__file__).resolve().parents[1]


def launch(
    processes: int, script: list[str], *, config: str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run a script or `-m module` under `accelerate launch` with a shipped configuration, by default for the CPU."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    config = config or ("single_gpu" if processes == 1 else "cpu")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / f"{config}.yaml"), "--num_processes", str(processes)]
    command += ["--main_process_port", str(port), *script]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        **(env or {}),
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def run_here(main: Callable[[], None], *arguments: object) -> int:
    """Run a command in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(STATUS_FILE_VARIABLE, raising=False)
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        try:
            main()
        except SystemExit as stopped:
            return stopped.code
    return 0


def interruptible() -> None:
    """For a child about to start: SIGINT ends it, also where a shell runs the tests in the background, deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def user_environment(**more: str) -> dict[str, str]:
    """For launch.sh: the environment the tests run in counts as active, its requirements as installed, and a SLURM job
    the tests themselves may run in is not seen."""
    prefix = Path(sys.prefix)
    stamp = prefix / ".requirements-installed"
    if not stamp.exists():
        stamp.write_bytes((ROOT / "requirements.txt").read_bytes())
    seen = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    return {**seen, "VIRTUAL_ENV": str(prefix), **more}


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures(run: Path) -> list[dict[str, float]]:
    """A run's metrics without those that no two runs share: times, throughput and memory."""
    hidden = ("time/", "throughput/", "memory/")
    return [{name: value for name, value in row.items() if not name.startswith(hidden)} for row in metrics(run)]
