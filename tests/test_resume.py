"""A run that is cut off, however, goes on as if nothing had been."""

import gc
import hashlib
import json
import re
import shutil
import signal
import sys

import pytest
import torch
import yaml
from launching import metrics
from safetensors.torch import load_file, save_file

from benchmarks.kill_and_resume import differences, kill_and_resume
from pipeline import evaluate, train
from pipeline.assembly import open_data, open_run, open_tuned
from pipeline.errors import STATUS_FILE_VARIABLE, UserError
from pipeline.inputs import check_same_texts
from pipeline.models.saving import saved_step
from pipeline.runtime import checkpoints
from pipeline.trainer import PPOTrainer

LORA = ("--use_peft", "--lora_r", "4")
QUICK = ("--steps", "5", "--save_every_steps", "1", "--evaluation_prompts", "0")


@pytest.mark.parametrize(
    ("config", "settings", "kills"),
    [("cpu", (), 2), ("zero3", LORA, 1)],
    ids=["ddp", "zero3-lora"],
)
def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path, tiny_recipe, config, settings, kills):
    if settings:  # more to remember
        settings = (*settings, "--reward_scaling", "true", "--kl_adaptive", "true")
    kill_and_resume(tiny_recipe, tmp_path, *QUICK, *settings, kills=kills, config=config, seed=kills)


@pytest.fixture
def start(monkeypatch, tmp_path, tiny_recipe, capfd):
    """Run the train command in this process: (exit code, what it printed)."""
    monkeypatch.delenv(STATUS_FILE_VARIABLE, raising=False)

    def start(name: str, *settings: str, stop_before: int | None = None, by: int = signal.SIGTERM) -> tuple[int, str]:
        arguments = ["--config", tiny_recipe, "--output_dir", str(tmp_path / name), "--evaluation_prompts", "0"]
        monkeypatch.setattr(sys, "argv", ["train", *arguments, *settings])
        draw = PPOTrainer.draw_prompts

        def interrupted(self, step):
            if step + 1 == stop_before:  # in the step before, so that the loop sees it next
                signal.raise_signal(by)
            return draw(self, step)

        with monkeypatch.context() as patch:
            patch.setattr(PPOTrainer, "draw_prompts", interrupted)
            try:
                train.main()
                code = 0
            except SystemExit as stopped:
                code = stopped.code
        output = capfd.readouterr()
        return code, output.out + output.err

    return start


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_a_checkpoint_and_its_exit_code(start, tmp_path, by):
    start("whole")
    code, said = start("run", "--save_every_steps", "0", stop_before=2, by=by)
    assert code == 128 + by and f"Stopped by {by.name} after 2 of 3 steps" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]
    code, said = start("run", "--save_every_steps", "0")
    assert code == 0 and re.search("Going on from .*step_000002, after step 2", said)
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_running_statistics_and_the_adapted_kl_price_come_back(start, tmp_path):
    settings = ("--reward_scaling", "true", "--kl_adaptive", "true", "--kl_target", "0.01", "--kl_horizon", "20")
    settings += ("--reward", "sentiment", "fluency=0.5", "--reward_whitening", "true")
    start("whole", *settings)
    start("run", *settings, stop_before=2)
    start("run", *settings)
    assert differences(tmp_path / "whole", tmp_path / "run") == []
    prices = [line["kl/coef"] for line in metrics(tmp_path / "run")]
    assert len(set(prices)) == 3


def test_a_finished_run_is_moved_aside_and_an_unfinished_one_goes_on(start, tmp_path):
    start("run")
    code, said = start("run")
    assert code == 0 and "is now in" in said and "Going on" not in said
    assert len(metrics(tmp_path / "run.previous")) == len(metrics(tmp_path / "run")) == 3


def test_never_starts_over(start, tmp_path):
    start("run", stop_before=2)
    code, said = start("run", "--resume", "never")
    assert code == 0 and "Going on" not in said
    assert len(metrics(tmp_path / "run.previous")) == 2 and len(metrics(tmp_path / "run")) == 3


def test_a_checkpoint_of_another_run_can_be_named(start, tmp_path):
    start("whole")
    start("first", stop_before=2)
    for path in (tmp_path / "first", tmp_path / "first" / "checkpoints" / "step_000002"):
        code, said = start("second", "--resume", str(path))
        assert code == 0 and "Going on" in said
        assert differences(tmp_path / "whole", tmp_path / "second") == []
    assert len(metrics(tmp_path / "first")) == 2


def test_other_settings_are_refused_by_name_and_nothing_is_touched(start, tmp_path):
    start("run", stop_before=2)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    code, said = start("run", "--learning_rate", "0.5", "--seed", "3", "--microbatch_size", "2")
    assert code == 2
    assert "learning_rate was 0.001 and is 0.5; seed was 0 and is 3. Restore them" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_other_texts_under_the_same_name_are_refused_and_none_of_before_fingerprints(start, tmp_path, reviews):
    file, run = tmp_path / "mine.jsonl", tmp_path / "run"
    settings = ("--dataset", str(file))

    def write(texts):
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    write(["", *reviews.texts])
    _, said = start("run", *settings, stop_before=2)
    assert said.count(f"1 of 81 rows of {file} have no text and are left out.") == 1, "said at the start"
    write([text[4:] for text in reviews.texts])
    before = (run / "metrics.jsonl").read_bytes()
    code, said = start("run", *settings)
    assert code == 2 and (run / "metrics.jsonl").read_bytes() == before
    assert f"error: dataset={str(file)!r}: the openings that the tokenizer of " in said
    assert "are not those that " in said and "step_000002 was trained with" in said and "--resume never" in said
    with pytest.raises(UserError, match="step_000002 was trained with"):
        evaluate.prepare(run, open_run("", str(run))[1], None)
    _, config = open_run("", str(run), ("--prompt_max_tokens", "7"))  # other prompts on purpose
    data = open_data(config)
    check_same_texts(run, config, data.training, data.held_out)
    write([*reviews.texts, "too short to give a prompt"])
    state = run / "checkpoints/step_000002/trainer_state.json"
    content = json.loads(state.read_text())
    assert start("run", *settings)[0] == 0, "the same openings"
    assert set(content.pop("inputs")) == {"dataset", "model_path", "reward_model_path"}
    write([text[4:] for text in reviews.texts])
    shutil.rmtree(run / "checkpoints/step_000003")
    (run / "finished").unlink()
    state.write_text(json.dumps(content))
    seal = json.loads((state.parent / "checkpoint.json").read_text())
    digest = hashlib.sha256(state.read_bytes()).hexdigest()
    seal["files"][state.name] = {"bytes": state.stat().st_size, "sha256": digest}
    (state.parent / "checkpoint.json").write_text(json.dumps(seal))
    assert start("run", *settings)[0] == 0, "a checkpoint that has no fingerprints"


@pytest.mark.parametrize("setting", ["model_path", "reward_model_path"])
def test_other_weights_under_the_same_name_are_refused_by_train_and_by_what_reads_the_run(
    start, tmp_path, monkeypatch, tiny_lm, tiny_classifier, setting
):
    model = tmp_path / "model"
    shutil.copytree(tiny_lm if setting == "model_path" else tiny_classifier, model)
    start("run", f"--{setting}", str(model), stop_before=2)
    weights = load_file(model / "model.safetensors")
    name, changed = next(iter(weights.items()))
    changed.view(-1)[0] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("pipeline.train.build_parts", lambda *_: pytest.fail("a model was loaded"))
    code, said = start("run", f"--{setting}", str(model))
    assert code == 2 and f"error: {setting}={str(model)!r}: its weights are not those that " in said, name
    if setting == "model_path":  # what evaluate, chat and export open
        run = tmp_path / "run"
        for folder in (run, run / "checkpoints" / "step_000002"):
            with pytest.raises(
                UserError, match=re.escape(f"model_path={str(model)!r}: its weights are not those that ")
            ):
                open_tuned(folder, open_run("", str(run))[1], "cpu")


def test_a_run_under_a_constant_learning_rate_can_be_made_longer(start, tmp_path):
    constant = ("--learning_rate_schedule", "constant")
    start("whole", *constant)
    start("run", *constant, "--steps", "2", stop_before=2)
    code, _ = start("run", *constant)
    assert code == 0 and differences(tmp_path / "whole", tmp_path / "run") == []
    start("linear", stop_before=2)
    code, said = start("linear", "--steps", "4")
    assert code == 2 and "steps was 3 and is 4" in said


def test_a_finished_run_that_goes_on_is_none_until_it_is_finished_again(start, tmp_path, monkeypatch):
    constant = ("--learning_rate_schedule", "constant", "--evaluation_prompts", "4")
    run = tmp_path / "run"
    start("run", *constant, "--steps", "2")
    ended = {"finished", "evaluation.json", "evaluation.md", "evaluation_samples.jsonl", "plane.png", "report.html"}
    assert ended <= {path.name for path in run.iterdir()}
    code, _ = start("run", *constant, "--steps", "9", "--resume", str(run), stop_before=3)
    assert code == 128 + signal.SIGTERM and saved_step(run) == 3
    assert ended & {path.name for path in run.iterdir()} == {"report.html"}
    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "sample", lambda *_: 1 / 0)  # a crash
        with pytest.raises(ZeroDivisionError):
            start("run", *constant, "--steps", "4")
    gc.collect()  # the lock of the run that crashed in this process
    assert saved_step(run) is None, "what was saved is not of the step at which it ended"
    code, _ = start("run", *constant, "--steps", "4")
    assert code == 0 and saved_step(run) == len(metrics(run)) == 4 and ended <= {path.name for path in run.iterdir()}


@pytest.mark.parametrize("path", ["none", "run/checkpoints/step_000099"])
def test_a_checkpoint_that_is_not_there_is_an_error(start, tmp_path, path):
    code, said = start("run", "--resume", str(tmp_path / path))
    assert code == 2 and "there is no such checkpoint" in said


def test_a_damaged_checkpoint_is_passed_over_or_refused_by_name(start, tmp_path):
    start("whole", "--save_every_steps", "1")
    start("run", "--save_every_steps", "1", stop_before=2)
    newest = tmp_path / "run" / "checkpoints" / "step_000002"
    (newest / "optimizer.bin").write_bytes(b"")
    code, said = start("run", "--save_every_steps", "1", "--resume", str(newest))
    assert code == 2 and "is not a whole checkpoint: optimizer.bin has 0 bytes" in said
    code, said = start("run", "--save_every_steps", "1")
    assert code == 0 and "step_000002 is damaged and passed over" in said and "after step 1" in said
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_a_full_disk_warns_and_the_run_goes_on(start, tmp_path, monkeypatch):
    seal = checkpoints._seal

    def full(folder, step, accelerator):
        if step:
            raise OSError(28, "No space left on device")
        seal(folder, step, accelerator)

    monkeypatch.setattr(checkpoints, "_seal", full)
    code, said = start("run", "--save_every_steps", "1")
    assert code == 0 and "warning: no checkpoint could be written" in said and "No space left on device" in said
    assert len(metrics(tmp_path / "run")) == 3
    code, said = start("stopped", "--save_every_steps", "1", stop_before=2)
    assert code == 143 and "after 2 of 3 steps. The same command goes on from the start." in said


def test_how_many_memory_allowed_at_the_start_is_how_many_go_on(start, tmp_path, monkeypatch):
    def used():
        return yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["rollout_microbatch_size"]

    code, said = start("run", "--rollout_microbatch_size", "null", stop_before=2)
    assert code == 143 and used() == 16 and "16 rollouts (16 at a time)" in said
    monkeypatch.setattr("pipeline.assembly.free_memory_bytes", lambda device: 0.0)
    assert start("run", "--rollout_microbatch_size", "null")[0] == 0 and used() == 16
    assert start("other", "--rollout_microbatch_size", "null", "--steps", "1")[0] == 0
    assert yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())["rollout_microbatch_size"] == 1


def test_two_runs_cannot_write_into_one_directory(start, tmp_path):
    from pipeline.run_directory import lock_output_dir

    with lock_output_dir(tmp_path / "run"):
        code, said = start("run")
    assert code == 2 and "another run is writing" in said
    assert start("run")[0] == 0


def test_the_last_checkpoint_holds_what_was_saved(start, tmp_path):
    start("run", "--save_every_steps", "2", "--keep_last", "1")
    (last,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert last.name == "step_000003"
    weights, model = load_file(last / "trainable.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    for name, value in model.items():
        torch.testing.assert_close(weights[f"model.{name}"], value, atol=0, rtol=0)
