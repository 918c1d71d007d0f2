"""A run of a model whose texts begin with BOS and end in two ways: training, evaluation, chat, export, frontier."""

import json
import shutil

import pytest
import torch
from launching import metrics, run_here
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from pipeline import chat, evaluate, export, frontier, train
from pipeline.assembly import open_run
from pipeline.chat import open_chat
from pipeline.rollout import rollout as sampling
from pipeline.trainer import PPOTrainer


@pytest.fixture(scope="module")
def recorded():
    """Prompts (as unpadded ids) and ends of every batch that was sampled."""
    return {"prompts": [], "ends": []}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_recipe, bos_lm, recorded):
    folder = tmp_path_factory.mktemp("bos") / "run"
    decode = sampling.decode

    def watched(model, prompts, mask, *arguments, **options):
        recorded["prompts"] += [row[keep].tolist() for row, keep in zip(prompts, mask, strict=True)]
        recorded["ends"].append(options["eos_token_id"])
        return decode(model, prompts, mask, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "decode", watched)
        options = ("--model_path", bos_lm, "--steps", 2, "--use_peft", "--lora_target_modules", "all-linear",
                   "--reward", "sentiment", "coherence", "--learning_rate", "3e-2")  # fmt: skip
        assert run_here(train.main, "--config", tiny_recipe, "--output_dir", folder, *options) == 0
        assert run_here(frontier.main, "--config", folder / "config.yaml", "--frontier", folder / "frontier.json",
                        "--frontier_prompts", 4, "--frontier_samples", 4) == 0  # fmt: skip
    return folder


def test_every_prompt_of_training_evaluation_and_frontier_begins_with_bos_once(run, recorded, bos_tokenizer):
    bos = bos_tokenizer.bos_token_id
    assert len(recorded["prompts"]) > 2 * 16 + 2 * 8
    assert all(row[0] == bos and bos not in row[1:] and 3 <= len(row) <= 9 for row in recorded["prompts"])
    assert set(recorded["ends"]) == {(301, 0)}


def test_prompts_and_responses_are_shown_without_special_tokens(run):
    rows = [json.loads(line) for line in (run / "evaluation_samples.jsonl").read_text().splitlines()]
    assert rows and not any("<" in row[side] for row in rows for side in ("prompt", "before", "after"))


def test_all_ends_are_saved_and_count_as_ends(run, bos_tokenizer):
    assert GenerationConfig.from_pretrained(run).eos_token_id == [301, 0]
    assert AutoTokenizer.from_pretrained(run).eos_token == bos_tokenizer.eos_token
    assert all(0 <= row["response/eos_fraction"] <= 1 for row in metrics(run))


def test_the_chat_begins_as_training_did_and_stops_at_either_end(run, bos_tokenizer):
    opened = open_chat(*open_run("", str(run)))
    bos = bos_tokenizer.bos_token_id
    assert opened._ids("the film", 4) == opened._ids("<bos>the film", 4) == bos_tokenizer("the film").input_ids
    assert opened._ids("the film", 4)[0] == bos and opened.eos_token_ids == (301, 0)
    *_, last = opened.continue_opening("the film", temperature=1.0, tokens=8, samples=2)
    assert not any("<bos>" in side.text for side in last.original + last.tuned)


def test_an_export_keeps_all_ends_and_the_configuration(run, bos_lm, tmp_path):
    for what in ("merged", "adapter"):
        assert run_here(export.main, run, "--what", what, "--to", tmp_path / what) == 0
        assert GenerationConfig.from_pretrained(tmp_path / what).eos_token_id == [301, 0]
    merged, base = AutoConfig.from_pretrained(tmp_path / "merged"), AutoConfig.from_pretrained(bos_lm)
    assert (merged.eos_token_id, merged.bos_token_id) == (base.eos_token_id, base.bos_token_id)


def test_a_run_whose_adapter_is_nan_is_refused_by_all_that_open_it(run, tmp_path, capfd):
    spoilt = tmp_path / "run"
    shutil.copytree(run, spoilt)
    tensors = load_file(spoilt / "adapter_model.safetensors")
    next(tensor for name, tensor in tensors.items() if "lora_B" in name).fill_(float("nan"))
    save_file(tensors, spoilt / "adapter_model.safetensors")
    commands = ((evaluate.main, spoilt), (chat.main, spoilt),
                (export.main, spoilt, "--what", "merged", "--to", tmp_path / "merged"))  # fmt: skip
    for command in commands:
        assert run_here(*command) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: the policy of {spoilt} cannot be used, its logits are NaN or infinite")
        assert "lora_B" in error


def test_a_policy_that_becomes_nan_ends_the_run_with_a_line_that_says_so(tiny_recipe, tmp_path, monkeypatch, capfd):
    update = PPOTrainer.update

    def spoiling(trainer, step, *arguments):
        stats = update(trainer, step, *arguments)
        with torch.no_grad():
            trainer.policy.model.transformer.h[0].mlp.c_fc.weight.fill_(float("nan"))
        return stats

    monkeypatch.setattr(PPOTrainer, "update", spoiling)
    arguments = ("--config", tiny_recipe, "--output_dir", tmp_path / "run", "--steps", 9, "--evaluation_prompts", 0)
    assert run_here(train.main, *arguments) == 4
    assert "since the policy's logits are NaN or infinite" in capfd.readouterr().err
