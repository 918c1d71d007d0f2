"""FSDP2, prepared by Accelerate itself, on two workers: the run of one process, whose weights are saved whole."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from fsdp_runs import BF16, LORA, LOSS_SCALE, STEPS
from launching import ROOT, figures, launch, run_here
from peft import PeftModel
from recorded_run import PROBE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.kill_and_resume import differences
from pipeline import export, train


@pytest.fixture(scope="module")
def workers(tmp_path_factory, tiny_recipe):
    """The folder of the runs that two workers made."""
    root = tmp_path_factory.mktemp("fsdp2")
    shipped = (ROOT / "accelerate_configs" / "fsdp2.yaml").read_text().splitlines(keepends=True)
    own = root / "own.yaml"  # a user's own, which leaves `accelerate launch` its default
    own.write_text("".join(line for line in shipped if "cpu_ram_efficient" not in line))
    script = ["tests/fsdp_runs.py", str(root), "--config", tiny_recipe, "--steps", str(STEPS)]
    done = launch(2, script, config=str(own.with_suffix("")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "a warning that nobody who runs this can act on"
    return root


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_recipe):
    """The folder of the same runs by one process."""
    root = tmp_path_factory.mktemp("alone")
    for name, settings in (("full", ()), ("lora", LORA), ("bf16", BF16)):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = ("--config", tiny_recipe, "--steps", STEPS, *settings, "--output_dir", root / name / "run")
        assert run_here(train.main, *options) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return root


def seen(workers: Path, name: str) -> list[dict]:
    return [torch.load(workers / name / f"seen{rank}.pt") for rank in range(2)]


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=PROBE).logits


def rounded(found: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether all these numbers are such as `dtype` can hold."""
    return torch.equal(found, found.to(dtype).to(found.dtype))


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_run_with_a_checkpoint_before_its_first_step_is_that_of_one_process(workers, alone, name):
    assert (workers / name / "run" / "checkpoints" / "step_000000").is_dir()
    one, two = torch.load(workers / name / "rank0.pt"), torch.load(workers / name / "rank1.pt")
    for mine, other in zip(one, two, strict=True):
        assert all(torch.equal(mine[field], other[field]) for field in mine)
    compared = list(zip(figures(alone / name / "run"), figures(workers / name / "run"), strict=True))
    assert len(compared) == STEPS
    for a, b in compared:
        assert b == pytest.approx(a, abs=1e-4, rel=1e-4)


def test_the_evaluation_at_the_end_is_that_of_one_process(workers, alone):
    a, b = (json.loads((root / "full" / "run" / "evaluation.json").read_text()) for root in (alone, workers))
    assert b["after"]["logit"]["mean"] == pytest.approx(a["after"]["logit"]["mean"], abs=1e-3)
    assert b["kl"] == pytest.approx(a["kl"], abs=1e-3)


@pytest.mark.parametrize("name", ["full", "resumed", "lora"])
def test_every_weight_is_shared_out_trained_and_tied_and_adam_counts_the_steps_taken(workers, name):
    for found in seen(workers, name):
        assert found["shared"] and found["tied"] and found["trainable"] == found["optimized"] > 2
        assert found["adam_steps"] == {sum(row["ppo/optimizer_steps"] for row in figures(workers / name / "run"))}


def test_a_resumed_run_ends_with_the_same_bits(workers):
    assert differences(workers / "full" / "run", workers / "resumed" / "run") == []


def test_the_saved_model_and_an_exported_checkpoint_are_the_policy_in_plain_transformers(workers, tmp_path):
    run, expected = workers / "full" / "run", torch.load(workers / "full" / "logits.pt")
    model, info = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()) and model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in load_file(run / "model.safetensors")
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    value_head = load_file(run / "value_head.safetensors")
    assert value_head["weight"].shape == (1, 32) and value_head["weight"].ne(0).all() and value_head["bias"] != 0
    checkpoint = run / "checkpoints" / f"step_{STEPS:06}"  # the parts of both workers, joined
    assert run_here(export.main, checkpoint, "--what", "full", "--to", tmp_path / "exported") == 0
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "exported")), logits_of(model))


def test_the_saved_adapter_is_the_policy_in_peft(workers, tiny_lm):
    run, expected = workers / "lora" / "run", torch.load(workers / "lora" / "logits.pt")
    adapter = load_file(run / "adapter_model.safetensors")
    assert adapter and all(tensor.numel() and tensor.any() for tensor in adapter.values())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32), run)
    torch.testing.assert_close(logits_of(loaded), expected, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_the_outputs_are_float32_and_the_first_step_is_that_of_one_process(workers, alone):
    for found in seen(workers, "bf16"):
        for outputs in found["outputs"]:
            assert {tensor.dtype for tensor in outputs.values()} == {torch.float32}
        first = found["outputs"][0]
        assert not rounded(first["logprobs"], torch.bfloat16) and not rounded(first["loss"], torch.bfloat16)
        last = found["outputs"][-1]  # the first values are zero
        assert not rounded(last["values"], torch.bfloat16)
    (a,), (b,) = figures(alone / "bf16" / "run"), figures(workers / "bf16" / "run")
    assert b["ppo/first_minibatch_ratio_deviation"] == b["kl/sequence_k1"] == 0
    assert b["reward/mean"] == a["reward/mean"] and b["ppo/entropy"] == pytest.approx(a["ppo/entropy"], rel=1e-4)
    assert b["ppo/gradient_norm"] == pytest.approx(a["ppo/gradient_norm"], rel=1e-3)
    assert b["ppo/policy_loss"] == pytest.approx(a["ppo/policy_loss"], rel=2e-2)


def test_in_float16_the_workers_find_one_loss_scale_and_skip_the_same_steps(workers):
    one, two = seen(workers, "fp16")
    assert one["loss_scale"] == two["loss_scale"] < LOSS_SCALE
    (taken,) = one["adam_steps"]
    assert one["adam_steps"] == two["adam_steps"] and 0 < taken < 4  # of four
    assert {tensor.dtype for outputs in one["outputs"] for tensor in outputs.values()} == {torch.float32}


def test_a_gradient_that_is_no_number_on_one_worker_is_skipped_on_both_and_the_start_comes_back(workers, tiny_lm):
    assert [(workers / "spoilt" / f"code{rank}").read_text() for rank in range(2)] == ["4", "4"]
    counted = [(row["ppo/optimizer_steps"], row["ppo/skipped_steps"]) for row in figures(workers / "spoilt" / "run")]
    assert counted == [(2, 2), (0, 4)]
    assert [found["adam_steps"] for found in seen(workers, "spoilt")] == [{0}, {0}]
    saved, start = (load_file(f"{folder}/model.safetensors") for folder in (workers / "spoilt" / "run", tiny_lm))
    assert saved.keys() == start.keys() and all(torch.equal(saved[name], start[name]) for name in start)
