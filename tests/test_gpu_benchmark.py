"""The GPU benchmark on a machine without one: every check's code runs, and what goes wrong is reported."""

import json
import subprocess
import sys

import pytest
from launching import ROOT

from benchmarks import gpu
from benchmarks.gpu_checks import CHECKS, Check

# What needs CUDA or several GPUs from its first line to its last.
NOT_REHEARSED = {
    "training/full_fp16", "training/lora_fp16", "strategies/zero1", "strategies/zero2", "strategies/zero3",
    "strategies/zero3_offload", "strategies/fsdp2", "strategies/shard_reference", "speed/start_up",
    "speed/data_parallel",
}  # fmt: skip


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """What the command says and writes, run as a user runs it."""
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(output.read_text())


def test_every_check_runs_on_a_cpu_or_says_why_not(rehearsal):
    said, result = rehearsal
    found = {name: check["status"] for name, check in result["checks"].items()}
    assert list(found) == [check.name for check in CHECKS]
    assert {name for name, status in found.items() if status == "not rehearsed"} == NOT_REHEARSED
    assert {status for name, status in found.items() if name not in NOT_REHEARSED} == {"passed"}
    assert all(check["conditions"] or check["measured"] for name, check in result["checks"].items()
               if name not in NOT_REHEARSED)  # fmt: skip
    assert all(check["not_rehearsed"] for name, check in result["checks"].items() if name in NOT_REHEARSED)
    assert all(f"{name} " in said for name in found)


def test_the_file_says_what_was_run_on_what_and_when(rehearsal):
    _said, result = rehearsal
    assert result["passed"] is True and result["rehearsal"] is True and result["seconds"] > 0
    assert result["command"].startswith("python") and "-m benchmarks.gpu --rehearse" in result["command"]
    assert result["cpu_cores"] and result["gpus"] == [] and result["date"].startswith("20")
    assert {"torch", "transformers", "accelerate", "deepspeed"} <= set(result["versions"])


def test_nothing_that_goes_wrong_stops_the_others_and_the_exit_code_tells(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/tests")
    limits = {"passes": 30, "fails": 30, "raises": 30, "dies": 30, "hangs": 0.2, "cannot_be_rehearsed": 30}
    checks = [Check("gpu_failures", name, seconds) for name, seconds in limits.items()]
    output = tmp_path / "gpu.json"
    assert gpu.main(["--rehearse", "--output", str(output)], checks) == 1
    result = json.loads(output.read_text())
    found = {name.removeprefix("gpu_failures/"): check for name, check in result["checks"].items()}
    assert result["passed"] is False
    assert {name: check["status"] for name, check in found.items()} == {
        "passes": "passed", "fails": "failed", "raises": "crashed", "dies": "crashed", "hangs": "timed out",
        "cannot_be_rehearsed": "not rehearsed",
    }  # fmt: skip
    assert found["passes"]["measured"] == {"device": "cpu"}
    assert found["fails"]["why"] == "error < 0.1" and found["fails"]["measured"] == {"error": 0.5}
    assert found["raises"]["why"].endswith("ZeroDivisionError: a fault in the program")
    assert found["raises"]["measured"] == {"until": "here"}
    assert found["dies"]["why"] == "exit code 7\nthe last line of a process that died"
    assert found["hangs"]["why"] == "not done after 0.6 s\nwaiting for something that never comes"
    said = capsys.readouterr().out
    assert "gpu_failures/fails" in said and "1 passed, 1 failed, 2 crashed, 1 timed out, 1 not rehearsed in" in said
    assert gpu.main(["--rehearse", "--only", "gpu_failures/passes", "gpu_failures/cannot_be_rehearsed"], checks) == 0


def test_without_a_gpu_it_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path / "gpu.json")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("benchmarks.gpu: no GPU (torch 2.")
    assert said.err.endswith("); --rehearse runs the checks' code on the CPU.\n") and said.err.count("\n") == 1
    assert not (tmp_path / "gpu.json").exists()


def test_a_check_that_there_is_not_is_named_with_those_there_are(capsys):
    assert gpu.main(["--only", "kernel"]) == 2
    assert "there is no check 'kernel'; the groups are machine, kernels, graphs" in capsys.readouterr().err


def test_every_check_is_there_and_says_what_it_is(capsys):
    assert gpu.main(["--list", "--only", "bits"]) == 0
    assert capsys.readouterr().out.split() == ["bits/same_run_twice", "bits/checkpoints_change_nothing", "bits/resumed"]
