"""One worker or two: the same responses, the same losses."""

from pathlib import Path

import pytest
import torch
from launching import launch, metrics
from transformers import AutoModelForCausalLM


def recorded(tmp_path: Path, recipe: str, processes: int, *settings: str) -> tuple[Path, list[list[dict]]]:
    """Run the recipe; return its directory and each worker's rollouts."""
    run, record = tmp_path / f"run{processes}", tmp_path / f"record{processes}"
    record.mkdir()
    script = ["tests/recorded_run.py", "--config", recipe, "--output_dir", str(run), *settings]
    done = launch(processes, script, env={"RECORD_DIR": str(record)})
    assert done.returncode == 0, done.stdout + done.stderr
    return run, [torch.load(record / f"rank{rank}.pt") for rank in range(processes)]


@pytest.mark.parametrize("settings", [(), ("--use_peft", "--lora_r", "4")], ids=["full", "lora"])
def test_two_workers_sample_and_learn_what_one_does(tmp_path, tiny_recipe, settings):
    # More microbatches than one a worker, ragged lengths, a last microbatch that is smaller than the others.
    one, (alone,) = recorded(tmp_path, tiny_recipe, 1, *settings)
    two, workers = recorded(tmp_path, tiny_recipe, 2, *settings)
    assert len(alone) == 3
    for step in range(3):
        for name, expected in alone[step].items():
            mine, other = workers[0][step][name], workers[1][step][name]
            assert torch.equal(mine, other), f"workers disagree on {name} at step {step}"
            if expected.is_floating_point():
                torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)
            else:
                assert torch.equal(mine, expected), f"{name} at step {step}"
    for a, b in zip(metrics(one), metrics(two), strict=True):
        compared = [name for name in a if not name.startswith(("time/", "throughput/", "memory/"))]
        assert len(compared) > 25
        for name in compared:
            assert b[name] == pytest.approx(a[name], abs=1e-4, rel=1e-4), name
    if not settings:
        weights = [AutoModelForCausalLM.from_pretrained(run).state_dict() for run in (one, two)]
        for name in weights[0]:
            torch.testing.assert_close(weights[1][name], weights[0][name], atol=1e-4, rtol=1e-3)


def test_a_fault_on_one_worker_ends_both_with_its_message_and_a_saved_model(tmp_path, tiny_recipe):
    (tmp_path / "faulty_reward.py").write_text(
        "import os\ncalls = 0\n"
        "def score(prompts, responses):\n"
        "    global calls\n    calls += 1\n"
        "    if os.environ.get('RANK') == '1' and calls > 3:\n        raise KeyError('lost my keys')\n"
        "    return [0.0] * len(responses)\n"
    )
    run = tmp_path / "run"
    script = ["-m", "pipeline.train", "--config", tiny_recipe, "--output_dir", str(run)]
    status = tmp_path / "status"
    done = launch(
        2,
        [*script, "--reward", "faulty_reward:score"],
        env={"PYTHONPATH": f"{tmp_path}:.", "PIPELINE_STATUS_FILE": str(status)},
    )
    assert done.returncode == 0, done.stderr
    code, message = status.read_text().split("\n", 1)
    assert code == "3" and "score raised KeyError: 'lost my keys'" in message
    assert len(metrics(run)) == 2  # the first call tries the reward, the fourth fails
    AutoModelForCausalLM.from_pretrained(run)


def test_sizes_that_do_not_divide_by_the_workers_are_refused(tmp_path, tiny_recipe):
    status = tmp_path / "status"
    script = ["-m", "pipeline.train", "--config", tiny_recipe, "--rollout_batch_size", "15", "--minibatch_size", "5"]
    launch(2, [*script, "--output_dir", str(tmp_path / "run")], env={"PIPELINE_STATUS_FILE": str(status)})
    expected = "rollout_batch_size=15 is not a multiple of the number of workers=2; 14 or 16 would do."
    assert status.read_text() == f"2\nerror: {expected}\n"
    assert not (tmp_path / "run").exists()
