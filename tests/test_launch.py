"""launch.sh as a user meets it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, metrics
from transformers import AutoModelForCausalLM


def environment() -> dict[str, str]:
    """The environment the tests run in counts as active; its requirements are marked as installed."""
    prefix = Path(sys.prefix)
    stamp = prefix / ".requirements-installed"
    if not stamp.exists():
        stamp.write_bytes((ROOT / "requirements.txt").read_bytes())
    return {**os.environ, "VIRTUAL_ENV": str(prefix)}


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["./launch.sh", *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )


def test_help_names_every_way_to_call_it():
    shown = run("--help")
    assert shown.returncode == 0
    for word in ("recipes/quickstart.yaml", "test", "--config", "--num_processes", "--mixed_precision"):
        assert word in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes/none.yaml"], "there is no recipe recipes/none.yaml; those shipped: recipes/"),
        (["--config", "none"], "there is no accelerate configuration none; those shipped: accelerate_configs/"),
    ],
)
def test_a_missing_file_is_named_before_anything_is_started(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_bad_setting_ends_all_workers_with_one_line_and_exit_code_2(tmp_path, tiny_recipe):
    done = run(tiny_recipe, "--minibatch_size", "7", "--output_dir", str(tmp_path / "run"), "--config", "cpu")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: rollout_batch_size=16 is not a multiple of minibatch_size=7; 14 or 21 would do."
    )
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1


def test_ctrl_c_ends_two_workers_at_a_step_and_saves(tmp_path, tiny_recipe):
    directory = tmp_path / "run"
    command = ["./launch.sh", tiny_recipe, "--steps", "100000", "--output_dir", str(directory), "--config", "cpu"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (directory / "metrics.jsonl").exists() or len(metrics(directory)) < 2:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Stopped by SIGINT after" in output and "Traceback" not in errors
    AutoModelForCausalLM.from_pretrained(directory)
    assert len(metrics(directory)) >= 2
