"""Runs checks in worker processes, each against its own time limit; what crashes or hangs does not stop the others."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from benchmarks.gpu_checks import Check

ROOT = Path(__file__).resolve().parents[2]
LOG_LINES = 12
START_SECONDS = 60  # for a worker to start and import, beside the first check's own limit
SLACK_ON_CPU = 3  # a rehearsal may share its cores with others
Result = dict[str, object]


def run_checks(checks: Sequence[Check], *, rehearse: bool, report: Callable[[Check, Result], None]) -> None:
    """Run the checks in order and give each one's result to `report` as it comes.

    A worker runs the checks of one group (in a rehearsal all of them, to import once); after one that crashed or took
    too long the others go on in a new worker.
    """
    left = list(checks)
    while left:
        group = left[0].module
        batch = left if rehearse else [check for check in left if check.module == group]
        left = left[_run_worker(batch, rehearse=rehearse, report=report) :]


def _run_worker(checks: Sequence[Check], *, rehearse: bool, report: Callable[[Check, Result], None]) -> int:
    """Start one worker for the checks; how many of them, from the first, have a result now: at least one."""
    done: list[Result] = []

    def add(result: Result) -> None:
        report(checks[len(done)], result)
        done.append(result)

    with tempfile.TemporaryDirectory() as folder:
        progress, log = Path(folder) / "report.jsonl", Path(folder) / "log"
        progress.touch()
        command = [sys.executable, "-m", "benchmarks.gpu_checks.worker", str(progress)]
        command += [f"{check.module}:{check.function}" for check in checks]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        if rehearse:
            command.append("--rehearse")
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with log.open("wb") as output:
            worker = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        start, log_start, extra, read = time.monotonic(), 0, START_SECONDS, 0
        try:
            while len(done) < len(checks):
                ended = worker.poll() is not None
                lines = progress.read_text(encoding="utf-8").split("\n")[:-1]
                for line in lines[read:]:
                    entry = json.loads(line)
                    start, extra = time.monotonic(), 0
                    if "result" in entry:
                        add(entry["result"])
                    else:
                        log_start = entry["log_bytes"]
                read = len(lines)
                seconds = time.monotonic() - start
                if len(done) == len(checks):
                    break
                if ended:
                    if not done or done[-1]["status"] != "crashed":  # it wrote that itself before it ended
                        add(_without_result("crashed", seconds, f"exit code {worker.returncode}", log, log_start))
                    break
                limit = checks[len(done)].seconds * (SLACK_ON_CPU if rehearse else 1)
                if seconds > limit + extra:
                    add(_without_result("timed out", seconds, f"not done after {limit:g} s", log, log_start))
                    break
                time.sleep(0.05)
        finally:
            end_with_children(worker)
    return len(done)


def _without_result(status: str, seconds: float, why: str, log: Path, log_start: int) -> Result:
    lines = log.read_bytes()[log_start:].decode(errors="replace").splitlines()[-LOG_LINES:]
    return {
        "status": status,
        "seconds": round(seconds, 2),
        "why": "\n".join([why, *lines]),
        "measured": {},
        "conditions": {},
        "not_rehearsed": [],
    }


def end_with_children(process: subprocess.Popen) -> None:
    """Kill a process that still runs, with all it started: a launcher's workers have sessions of their own."""
    try:
        everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        everyone = []
    for one in everyone:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
