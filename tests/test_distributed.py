"""One worker or several, however weights are shared: the same responses, the same losses, a model that reloads."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SHAPES, random_causal_lm
from launching import launch, metrics, run_here
from peft import PeftModel
from recorded_run import PROBE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline import export

LORA = ("--use_peft", "--lora_r", "4")
STEPS = 5


def recorded(directory: Path, recipe: str, processes: int, *settings: str, config: str | None = None) -> Path:
    """Run the recipe for five steps and keep every worker's rollouts in the directory."""
    directory.mkdir()
    script = ["tests/recorded_run.py", "--config", recipe, "--output_dir", str(directory / "run"), *settings]
    done = launch(processes, [*script, "--steps", str(STEPS)], config=config, env={"RECORD_DIR": str(directory)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "a warning that nobody who runs this can act on"
    assert done.stdout.count("trainable parameters") == 1, "rank zero alone speaks"
    return directory


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_recipe):
    """What a single process does: the directories of a full and of a LoRA run."""
    root = tmp_path_factory.mktemp("alone")
    return {
        settings: recorded(root / name, tiny_recipe, 1, *settings) for name, settings in [("full", ()), ("lora", LORA)]
    }


SHARINGS = [(config, 2, settings) for config in ("cpu", "zero1", "zero2", "zero3") for settings in ((), LORA)]


@pytest.mark.parametrize(
    ("config", "processes", "settings"),
    [*SHARINGS, ("cpu", 4, ())],
    ids=lambda value: {(): "full", LORA: "lora"}.get(value) if isinstance(value, tuple) else None,
)
def test_however_the_work_is_shared_the_run_is_the_same(tmp_path, tiny_recipe, alone, config, processes, settings):
    # Several microbatches a worker, ragged lengths, a last microbatch that is smaller than the others.
    expected = alone[settings]
    shared = recorded(tmp_path / "shared", tiny_recipe, processes, *settings, config=config)
    (one,) = [torch.load(expected / "rank0.pt")]
    workers = [torch.load(shared / f"rank{rank}.pt") for rank in range(processes)]
    assert len(one) == STEPS
    for step in range(STEPS):
        for name, value in one[step].items():
            mine = workers[0][step][name]
            for other in workers[1:]:
                assert torch.equal(mine, other[step][name]), f"workers disagree on {name} at step {step}"
            if value.is_floating_point():
                torch.testing.assert_close(mine, value, atol=1e-4, rtol=1e-4)
            else:
                assert torch.equal(mine, value), f"{name} at step {step}"
    for a, b in zip(metrics(expected / "run"), metrics(shared / "run"), strict=True):
        compared = [name for name in a if not name.startswith(("time/", "throughput/", "memory/"))]
        assert len(compared) > 25
        for name in compared:
            assert b[name] == pytest.approx(a[name], abs=1e-4, rel=1e-4), name
    model = reloaded(shared / "run", tiny_recipe if settings else None)
    with torch.no_grad():
        logits = model(input_ids=PROBE).logits
    torch.testing.assert_close(logits, torch.load(shared / "logits.pt"), atol=1e-5, rtol=1e-5)
    whole = (
        "--what",
        "merged" if settings else "full",
        "--to",
        tmp_path / "exported",
    )  # from the parts of both workers
    assert run_here(export.main, shared / "run" / "checkpoints" / f"step_{STEPS:06}", *whole) == 0
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")(input_ids=PROBE).logits
    assert (exported - torch.load(shared / "logits.pt")).abs().max() < 1e-4
    torch.testing.assert_close(logits, torch.load(expected / "logits.pt"), atol=1e-3, rtol=1e-3)


def test_recomputed_blocks_under_zero3_follow_the_same_run(tmp_path, tiny_recipe, alone):
    shared = recorded(tmp_path / "shared", tiny_recipe, 2, "--gradient_checkpointing", "true", config="zero3")
    for a, b in zip(metrics(alone[()] / "run"), metrics(shared / "run"), strict=True):
        for name in ("ppo/policy_loss", "ppo/value_loss", "ppo/gradient_norm", "reward/mean", "kl/sequence_k1"):
            assert b[name] == pytest.approx(a[name], abs=1e-4, rel=1e-4), name


def test_a_sharded_policy_and_reference_with_heads_of_their_own_say_what_replicated_ones_do(
    tmp_path, tiny_recipe, tokenizer, monkeypatch
):
    # GPT-2's head is its embedding, which the forward has gathered already when it comes to the head. Wide enough to
    # be shared out: DeepSpeed leaves weights of less than 100,000 numbers where they are.
    monkeypatch.setitem(SHAPES, "llama", SHAPES["llama"].replace("intermediate_size=64", "intermediate_size=4096"))
    model = str(tmp_path / "llama")
    random_causal_lm("llama", tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    alone = recorded(tmp_path / "alone", tiny_recipe, 1, "--model_path", model)
    options = ("--model_path", model, "--shard_reference", "true")
    shared = recorded(tmp_path / "shared", tiny_recipe, 2, *options, config="zero3")
    for step, (one, two) in enumerate(
        zip(torch.load(alone / "rank0.pt"), torch.load(shared / "rank1.pt"), strict=True)
    ):
        for name in ("ref_logprobs", "logprobs", "values"):
            torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-4, msg=f"{name} at step {step}")
    figures = [json.loads((run / "run" / "evaluation.json").read_text()) for run in (alone, shared)]
    for side in ("before", "after"):
        one, two = (figure[side]["logit"] for figure in figures)
        assert two["mean"] == pytest.approx(one["mean"], abs=1e-3)
    assert figures[1]["kl"] == pytest.approx(figures[0]["kl"], abs=1e-3)


def test_a_worker_that_fails_ends_the_run_with_its_name_and_traceback(tmp_path, tiny_recipe):
    (tmp_path / "crashing_run.py").write_text(
        "import os\nfrom pipeline import train\nfrom pipeline.trainer import PPOTrainer\n"
        "def advantages(self, rollout):\n"
        "    if os.environ['RANK'] == '1':\n        raise ZeroDivisionError('a fault in the program')\n"
        "    return original(self, rollout)\n"
        "original, PPOTrainer.advantages = PPOTrainer.advantages, advantages\ntrain.main()\n"
    )
    done = launch(
        2, [str(tmp_path / "crashing_run.py"), "--config", tiny_recipe, "--output_dir", str(tmp_path / "run")]
    )
    assert done.returncode == 1
    told = done.stderr[done.stderr.index("worker 1 of 2 on ") :]
    assert "Traceback" in told and "ZeroDivisionError: a fault in the program" in told


def test_shard_reference_without_zero3_is_refused(tmp_path, tiny_recipe):
    script = ["-m", "pipeline.train", "--config", tiny_recipe, "--output_dir", str(tmp_path / "run")]
    done = launch(1, [*script, "--shard_reference", "true"])
    assert done.returncode != 0 and "shard_reference=True needs ZeRO-3, and this run is single" in done.stderr


def reloaded(run: Path, base_recipe: str | None) -> torch.nn.Module:
    """The saved model as plain transformers, or PEFT on the recipe's base model, load it."""
    if base_recipe is None:
        return AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
    weights = load_file(run / "adapter_model.safetensors")
    assert weights and all(tensor.numel() > 0 for tensor in weights.values())
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    base = yaml.safe_load(Path(base_recipe).read_text())["model_path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run).eval()


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
