"""Kill a two-process run with SIGKILL at many moments, resume it each time, compare it with an undisturbed one.

    python -m benchmarks.kill_and_resume                      # 10 moments, the shipped models, about 5 minutes
    python -m benchmarks.kill_and_resume --kills 20 --config zero2

Half of the kills come while a checkpoint is being written. The resumed run's weights and metrics must equal the
undisturbed one's bit for bit; prints one line a kill and fails otherwise.
"""

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
UNTIMED = ("time/", "throughput/", "memory/")
SHORT = ["--steps", "8", "--save_every_steps", "1", "--rollout_batch_size", "32", "--minibatch_size", "16",
         "--response_min_tokens", "4", "--response_max_tokens", "8", "--evaluation_prompts", "0"]  # fmt: skip


def start(recipe: str, directory: Path, *settings: str, config: str = "cpu") -> subprocess.Popen:
    """Launch the run of two processes."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
               f"accelerate_configs/{config}.yaml", "--num_processes", "2", "--main_process_port", port,
               "-m", "pipeline.train", "--config", recipe, "--output_dir", str(directory), *settings]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    log = (directory.parent / f"{directory.name}.log").open("a")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, directory: Path) -> None:
    """Wait for a run that must succeed."""
    if process.wait(timeout=900):
        raise RuntimeError((directory.parent / f"{directory.name}.log").read_text()[-4000:])


def steps_written(directory: Path) -> int:
    """Lines of metrics.jsonl so far."""
    path = directory / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_when(
    process: subprocess.Popen, directory: Path, *, after_steps: int, writing: bool, delay: float, total: int
) -> str:
    """SIGKILL launcher and workers `delay` seconds after `after_steps` are reported, or in the next checkpoint."""
    launcher = psutil.Process(process.pid)
    aside = directory / "checkpoints" / ".writing"
    deadline = time.monotonic() + 600
    while steps_written(directory) < after_steps:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the run ended before it was killed")
        time.sleep(0.001)
    if writing:
        while not aside.exists() and process.poll() is None:
            time.sleep(0.0002)
    else:
        time.sleep(delay)
    everyone = [*launcher.children(recursive=True), launcher]  # workers have process groups of their own
    for one in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(everyone)
    assert steps_written(directory) < total, "the run was over before it was killed"
    files = sorted(path.name for path in aside.glob("*")) if aside.exists() else None
    return f"after step {steps_written(directory)}" + ("" if files is None else f", a checkpoint half written: {files}")


def differences(expected: Path, found: Path) -> list[str]:
    """What differs between two finished runs, bit for bit; timings aside."""
    weights = [
        {f"{path.name}: {name}": value for path in run.glob("*.safetensors") for name, value in load_file(path).items()}
        for run in (expected, found)
    ]
    assert len(weights[0]) > 2, f"no weights in {expected}"
    different = [name for name, value in weights[0].items() if not value.equal(weights[1][name])]
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (expected, found)
    ]
    if len(lines[0]) != len(lines[1]):
        return [*different, f"{len(lines[1])} instead of {len(lines[0])} steps"]
    for a, b in zip(*lines, strict=True):
        different += [
            f"{name} at step {a['step']}" for name in a if not name.startswith(UNTIMED) and a[name] != b[name]
        ]
    return different


def kill_and_resume(
    recipe: str, directory: Path, *settings: str, kills: int, config: str = "cpu", seed: int = 0
) -> None:
    """Raise `AssertionError` where a killed and resumed run differs from the undisturbed one in `directory`."""
    whole, steps = directory / "whole", int(settings[settings.index("--steps") + 1])
    finish(start(recipe, whole, *settings, config=config), whole)
    draw = random.Random(seed)
    for kill in range(kills):
        run = directory / f"killed{kill}"
        when = kill_when(
            start(recipe, run, *settings, config=config),
            run,
            after_steps=draw.randrange(steps - 1),
            writing=kill % 2 == 1,
            delay=draw.uniform(0, 0.3),
            total=steps,
        )
        finish(start(recipe, run, *settings, config=config), run)
        different = differences(whole, run)
        print(f"killed {when}: {'the same' if not different else different[:5]}", flush=True)
        assert not different, different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--config", default="cpu", help="One of accelerate_configs.")
    parser.add_argument("--output", type=Path, default=Path("runs/kill_and_resume"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    kill_and_resume(
        arguments.recipe, arguments.output.resolve(), *SHORT, kills=arguments.kills, config=arguments.config
    )
    print(
        f"{arguments.kills} of {arguments.kills} resumed runs ({arguments.config}) equal the undisturbed one, every bit"
    )


if __name__ == "__main__":
    main()
