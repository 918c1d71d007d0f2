"""Starting the real commands the way a user's launcher does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

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


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
