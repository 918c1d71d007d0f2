"""Each guard driven alone, then whole runs with bad settings."""

import json
import math
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import launch, metrics, run_here
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline import train as command
from pipeline.config import PPOSettings
from pipeline.errors import GUARD_STOPPED, STATUS_FILE_VARIABLE
from pipeline.guards import GuardError, Guards
from pipeline.run_directory import CHECKPOINTS
from pipeline.runtime.checkpoints import newest_whole, trained_weights
from pipeline.trainer import PPOTrainer

POSITIONS = "transformer.wpe.weight"
WELL = {"ppo/entropy": 4.0, "ppo/approx_kl": 0.01, "ppo/ratio_max": 1.5, "kl/sequence_k1": 3.0}
BAD = {
    "ratios": ({"ppo/approx_kl": 0.6, "ppo/ratio_max": 80.0}, "the ratios explode.*0.6 nats.*largest ratio is 80"),
    "kl": ({"kl/sequence_k1": 50.0}, "KL from the reference is 50 nats"),
    "entropy": ({"ppo/entropy": 0.7}, "entropy has collapsed from 4 to 0.7"),
    "nan": ({"kl/sequence_k1": math.nan}, "the reference's logits are NaN or infinite"),
    "nan policy": ({"kl/sequence_k1": math.nan, "ppo/entropy": math.nan}, "the policy's logits are NaN or infinite"),
}


def guards() -> Guards:
    """Guards that have seen a good first step."""
    new = Guards()
    assert new.check(PPOSettings(), WELL, [True]) == []
    return new


@pytest.mark.parametrize("change, sentence", BAD.values(), ids=BAD)
def test_a_bad_step_is_told_and_three_in_a_row_end_the_run(change, sentence):
    watch = guards()
    for times in (1, 2):
        (told,) = watch.check(PPOSettings(), WELL | change, [True])
        assert watch.bad == times and not watch.content
        assert re.search(sentence, told)
    with pytest.raises(GuardError, match=sentence) as stopped:
        watch.check(PPOSettings(), WELL | change, [True])
    assert re.search("3 bad steps in a row.*learning_rate=0.0001.*kl_coef=0.1.*--resume never", str(stopped.value))


def test_a_good_step_in_between_starts_the_count_again():
    watch = guards()
    for _ in range(3):
        for _ in range(2):
            watch.check(PPOSettings(), WELL | BAD["kl"][0], [True])
        assert watch.check(PPOSettings(), WELL, [True]) == []


def test_bad_steps_of_different_kinds_count_together():
    watch = guards()
    watch.check(PPOSettings(), WELL | BAD["kl"][0], [True])
    watch.check(PPOSettings(), WELL | BAD["ratios"][0], [True])
    with pytest.raises(GuardError, match="entropy"):
        watch.check(PPOSettings(), WELL | BAD["entropy"][0], [True])


def test_skipped_optimiser_steps_are_told_and_three_in_a_row_end_the_run():
    watch = guards()
    (told,) = watch.check(PPOSettings(), WELL, [True, False, False, True])
    assert told.startswith("2 of 4 optimiser steps skipped") and watch.content
    watch.check(PPOSettings(), WELL, [True, False])
    assert not watch.content
    with pytest.raises(GuardError, match=r"NaN or infinite in 3 optimiser steps in a row.*learning_rate=0.0001"):
        watch.check(PPOSettings(), WELL, [False, False, True])


def test_skipped_optimiser_steps_of_a_policy_that_is_nan_name_it():
    spoilt = WELL | BAD["nan policy"][0]
    with pytest.raises(GuardError, match=r"3 optimiser steps in a row.*since the policy's logits are NaN or infinite"):
        guards().check(PPOSettings(), spoilt, [False, False, False])


def test_guards_that_are_off_say_nothing():
    off = PPOSettings(guard_kl=None, guard_update_kl=None, guard_entropy=None)
    watch = guards()
    for change in (BAD[name][0] for name in ("ratios", "kl", "entropy")):
        assert watch.check(off, WELL | change, [True]) == []


def text_length(prompts, responses):
    return [float(len(text)) for text in responses]


@pytest.fixture
def train(monkeypatch, tiny_recipe, tmp_path, capfd):
    """Train with the tiny recipe: (exit code, what was printed)."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def train(*settings):
        always = ("--output_dir", tmp_path / "run", "--reward", "test_guards:text_length", "--steps", 30)
        code = run_here(command.main, "--config", tiny_recipe, *always, *settings)
        return code, "".join(capfd.readouterr())

    return train


def weights(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(("lora", "rate"), [(False, 1), (True, 30)])  # adapters survive 1 on some processors
def test_a_learning_rate_far_too_high_ends_with_the_last_good_state(train, tmp_path, tiny_lm, lora, rate):
    peft = ("--use_peft", "true") if lora else ()
    code, said = train("--learning_rate", rate, "--save_every_steps", "10", *peft)
    assert code == GUARD_STOPPED and "in a row" in said and f"Lower learning_rate={rate}" in said
    assert "Back to the last good state, after step 0" in said
    if not lora:
        assert len(metrics(tmp_path / "run")) == 3
        assert torch.equal(weights(tmp_path / "run"), weights(tiny_lm))
    assert newest_whole(tmp_path / "run" / CHECKPOINTS, print).name == "step_000000"


@pytest.mark.parametrize("config", ["cpu", "zero3"])
def test_two_workers_go_back_together(tmp_path, tiny_recipe, tiny_lm, config):
    status, run = tmp_path / "status", tmp_path / "run[1]"  # a name, no pattern of names
    settings = ["--learning_rate", "1.0", "--steps", "30", "--output_dir", str(run)]
    done = launch(
        2, ["-m", "pipeline.train", "--config", tiny_recipe, *settings], config=config,
        env={STATUS_FILE_VARIABLE: str(status)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    code, said = status.read_text().split("\n", 1)
    assert int(code) == GUARD_STOPPED and "in a row" in said
    assert "Back to the last good state, after step 0" in done.stdout
    assert torch.equal(weights(run), weights(tiny_lm))
    kept = trained_weights(newest_whole(run / CHECKPOINTS, print))
    assert torch.equal(kept[f"model.{POSITIONS}"], load_file(f"{tiny_lm}/model.safetensors")[POSITIONS])


def test_what_was_learned_before_the_first_bad_step_is_kept(train, tmp_path, monkeypatch):
    # The reference moves away at the fifth step, which no checkpoint may see.
    read = PPOTrainer.read

    def moved(self, responses):
        reading = read(self, responses)
        return replace(reading, logprobs=reading.logprobs - (10.0 if self.finished >= 4 else 0.0))

    monkeypatch.setattr(PPOTrainer, "read", moved)
    code, said = train("--save_every_steps", "2")
    assert code == GUARD_STOPPED and "KL from the reference is" in said and "after step 4" in said
    whole = newest_whole(tmp_path / "run" / CHECKPOINTS, print)
    assert whole.name == "step_000004"
    assert len(metrics(tmp_path / "run")) == 7
    state = json.loads((whole / "trainer_state.json").read_text())["trainer"]
    assert state["step"] == 4 and state["guards"]["bad"] == 0


def test_a_signal_between_bad_steps_leaves_the_checkpoint_from_before_them(train, tmp_path, monkeypatch):
    read, draw_prompts = PPOTrainer.read, PPOTrainer.draw_prompts

    def moved(self, responses):
        reading = read(self, responses)
        return replace(reading, logprobs=reading.logprobs - (10.0 if self.finished >= 4 else 0.0))

    def interrupted(self, step):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return draw_prompts(self, step)

    monkeypatch.setattr(PPOTrainer, "read", moved)
    monkeypatch.setattr(PPOTrainer, "draw_prompts", interrupted)
    code, _ = train("--save_every_steps", "2")
    assert code == 128 + signal.SIGTERM and len(metrics(tmp_path / "run")) == 6
    assert newest_whole(tmp_path / "run" / CHECKPOINTS, print).name == "step_000004"


def test_losses_that_are_not_finite_are_skipped_and_three_in_a_row_end_the_run(train, tmp_path, monkeypatch):
    advantages = PPOTrainer.advantages

    def spoilt(self, rollout):
        good = advantages(self, rollout)
        if self.finished in (1, 3):
            good.advantages[0, 0] = math.nan  # in one of two minibatches, in both epochs
        if self.finished == 5:
            good.advantages.fill_(math.nan)
        return good

    monkeypatch.setattr(PPOTrainer, "advantages", spoilt)
    code, said = train("--kl_early_stop", "100", "--save_every_steps", "1")
    assert "warning: step 2: 2 of 4 optimiser steps skipped" in said and "warning: step 4:" in said
    assert code == GUARD_STOPPED and "NaN or infinite in 3 optimiser steps in a row" in said
    assert newest_whole(tmp_path / "run" / CHECKPOINTS, print).name == "step_000005"
    assert weights(tmp_path / "run").isfinite().all()
    figures = metrics(tmp_path / "run")
    assert [row["ppo/skipped_steps"] for row in figures] == [0, 2, 0, 2, 0, 4]
    assert all(math.isfinite(value) for row in figures for value in row.values())
