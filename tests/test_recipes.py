"""A recipe is read as the command line reads the same texts, and what is wrong with it is told by its line."""

import os
import shutil

import pytest
from launching import run_here
from test_config import parse, refused
from transformers import TrainingArguments
from trl import SFTConfig

from pipeline import chat, evaluate, export
from pipeline.config import SECTIONS
from pipeline.errors import STATUS_FILE_VARIABLE, UserError
from pipeline.reward_model import RewardModelArguments
from pipeline.runtime.command import parse_recipe
from pipeline.sft import SFTArguments


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    monkeypatch.delenv(STATUS_FILE_VARIABLE, raising=False)


@pytest.mark.parametrize("text", ["", "# steps: 3\n", "- steps\n- 3\n", "just words"])
def test_a_recipe_that_is_no_mapping_is_named(capsys, recipe, text):
    path = recipe(text)
    assert f"{path} must hold settings" in refused(capsys, "--config", path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("steps: [1", ", line 1 is not YAML: expected ',' or ']'"),
        ("seed: 1\nppo:\n\tsteps: 3\n", ", line 3 is not YAML: a tab stands where YAML wants spaces"),
        ("seed: 1\nsteps:\t3: 4\n", ", line 2 is not YAML"),
        ("steps: 3\nseed: 1\nsteps: 4\n", ": steps stands there twice, in lines 1 and 3; remove one"),
        ("config: other.yaml", ": there is no setting config; one recipe cannot name another"),
        ("[1]: 2", ", line 1: a key must be the name of a setting"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named_with_its_line(capsys, recipe, text, fault):
    path = recipe(text)
    assert path + fault in refused(capsys, "--config", path)


@pytest.mark.parametrize("kinds", [(SFTArguments, SFTConfig), (RewardModelArguments, TrainingArguments), SECTIONS])
def test_no_recipe_sets_environment_variables(recipe, monkeypatch, kinds):
    monkeypatch.delenv("SET_BY_A_RECIPE", raising=False)
    path = recipe("env: {SET_BY_A_RECIPE: yes}\noutput_dir: out\n")
    with pytest.raises(UserError, match=f"{path}: there is no setting env"):
        parse_recipe(kinds, "", ["--config", path])
    assert "SET_BY_A_RECIPE" not in os.environ


@pytest.mark.parametrize(
    ("main", "options"), [(chat.main, ()), (evaluate.main, ()), (export.main, ("--what", "adapter", "--to", "out"))]
)
def test_no_run_that_is_opened_sets_environment_variables(lora_run, tmp_path, monkeypatch, capsys, main, options):
    monkeypatch.delenv("SET_BY_A_RUN", raising=False)
    monkeypatch.setattr(chat, "serve", lambda *_, **__: pytest.fail("it was opened"))
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(lora_run, tmp_path / "run")
    with (run / "config.yaml").open("a") as file:
        file.write("env: {SET_BY_A_RUN: yes}\n")
    assert run_here(main, run, *options) == 2
    assert "there is no setting env" in capsys.readouterr().err and "SET_BY_A_RUN" not in os.environ


def test_a_recipe_that_is_not_utf_8_is_named(capsys, tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("wandb_project: Müller".encode("latin-1"))
    assert f"{path} is not text in UTF-8" in refused(capsys, "--config", str(path))


@pytest.mark.parametrize("word", ["no", "'no'", "No", "off"])
def test_words_that_yaml_takes_for_truth_values_are_what_the_setting_wants(recipe, word):
    assert parse("--config", recipe(f"use_peft: {word.strip(chr(39))}")).model.use_peft is False
    if word.lower() != "off":
        config = parse("--config", recipe(f"mixed_precision: {word.lower()}\nreward_label: {word}"))
        assert (config.run.mixed_precision, config.reward.reward_label) == ("no", word.strip("'"))


def test_values_are_read_as_the_command_line_reads_them(recipe):
    """Not as YAML 1.1 does: false, eight, ninety, a date, and a text of 1e-4."""
    lines = ["resume: off", "seed: 010", "text_column: 1:30", "output_dir: 2026-11-25", "dataset: 3", "gamma: 1"]
    config = parse("--config", recipe("\n".join([*lines, "learning_rate: 1e-4", "reward_clip: 2", "kl_coef: '0.5'"])))
    assert (config.run.resume, config.run.seed, config.run.output_dir) == ("off", 10, "2026-11-25")
    assert (config.data.text_column, config.data.dataset) == ("1:30", "3")
    assert (config.ppo.learning_rate, config.ppo.kl_coef, config.reward.reward_clip) == (1e-4, 0.5, 2)


def test_one_value_stands_for_a_list_of_one(recipe):
    config = parse("--config", recipe("reward: length:2-3\nreport_to: wandb\nlora_target_modules: [1]"))
    assert (config.reward.reward, config.run.report_to) == (["length:2-3"], ["wandb"])
    assert config.model.lora_target_modules == ["1"]


def test_a_recipe_from_windows_is_read(tmp_path):
    path = tmp_path / "windows.yaml"
    path.write_bytes("\ufeffsteps: 3\r\nmixed_precision: no\r\n".encode())
    config = parse("--config", str(path))
    assert (config.ppo.steps, config.run.mixed_precision, config.run.output_dir) == (3, "no", "runs/windows")


def test_a_key_without_a_value_is_refused_where_the_setting_needs_one(capsys, recipe):
    assert "line 2: seed=null has no value" in refused(capsys, "--config", recipe("steps: 3\nseed:\n"))
    assert parse("--config", recipe("reward_clip:\nkl_early_stop: ~")).ppo.kl_early_stop is None


def test_two_recipes_are_refused(capsys, recipe):
    assert "--config is given 2 times" in refused(capsys, "--config", recipe("seed: 1"), "--config=other.yaml")


def test_the_training_commands_read_recipes_alike(recipe):
    """Types of libraries too: a name or a list, a group of settings, an enumeration."""
    text = "model_type: gpt2\ntext_column: no\nmax_length:\nlearning_rate: 1e-5\nlr_scheduler_type: cosine\n"
    text += "lr_scheduler_kwargs: {num_cycles: 2e-1}\nreport_to: none\nbf16: off\nsave_steps: 7\nuse_cpu: true"
    arguments, config = parse_recipe((SFTArguments, SFTConfig), "SFT.", ["--config", recipe(text)])
    assert (arguments.text_column, config.max_length, config.learning_rate) == ("no", None, 1e-5)
    assert (config.lr_scheduler_type, config.lr_scheduler_kwargs, config.save_steps) == (
        "cosine",
        {"num_cycles": 0.2},
        7,
    )
    text = "model_type: distilbert\ndatasets: a.csv\nuse_cpu: true"
    arguments, _ = parse_recipe((RewardModelArguments, TrainingArguments), "RM.", ["--config", recipe(text)])
    assert arguments.datasets == ["a.csv"]
    for line, fault in (("vocab_size:", "vocab_size=null has no value"), ("lr_scheduler_type: odd", "is not one of")):
        with pytest.raises(UserError, match=f"line 2: .*{fault}"):
            path = recipe(f"model_type: gpt2\n{line}")
            parse_recipe((SFTArguments, SFTConfig), "SFT.", ["--config", path])
