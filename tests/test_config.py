"""Settings: defaults that hold, bad values refused by name, and recipes read and written back."""

import dataclasses

import pytest
import yaml

from pipeline.assembly import parse_config
from pipeline.config import SECTIONS, Config, ConfigError, require_divides_by_workers, require_multiple
from pipeline.errors import STATUS_FILE_VARIABLE, user_errors

SECTION_OF = {field.name: section for section in SECTIONS for field in dataclasses.fields(section)}


def default_config(**settings: object) -> Config:
    """A `Config` without a recipe or a command line."""
    chosen = [{n: v for n, v in settings.items() if SECTION_OF[n] is section} for section in SECTIONS]
    return Config(*(section(**values) for section, values in zip(SECTIONS, chosen, strict=True)))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    monkeypatch.delenv(STATUS_FILE_VARIABLE, raising=False)


def parse(*arguments: str) -> Config:
    return parse_config("A run.", arguments)


def refused(capsys, *arguments: str) -> str:
    """The one line on stderr when these arguments end the program with exit code 2."""
    with pytest.raises(SystemExit) as caught, user_errors():
        parse(*arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, "one line"
    return error


def test_the_defaults_are_a_valid_run():
    assert default_config().as_dict() == {
        name: value for section in SECTIONS for name, value in dataclasses.asdict(section()).items()
    }


def test_every_setting_has_a_name_of_its_own_and_a_help_text():
    settings = [field for section in SECTIONS for field in dataclasses.fields(section)]
    assert len(SECTION_OF) == len(settings)
    assert all(field.metadata["help"].endswith(".") for field in settings)


NOT_POSITIVE = [
    *("lora_r", "lora_alpha", "rollout_microbatch_size", "temperature", "reward_batch_size", "reward_clip"),
    *("steps", "ppo_epochs", "minibatch_size", "microbatch_size", "learning_rate", "adam_eps", "max_grad_norm"),
    *("kl_target", "kl_horizon", "clip_range", "value_clip_range", "kl_early_stop", "samples_every_steps"),
]
NEGATIVE = [
    *("min_review_characters", "top_k", "eos_min_tokens", "kl_coef", "value_coef", "warmup_steps", "seed"),
    *("evaluation_prompts", "adam_beta1", "adam_beta2", "gamma", "gae_lambda", "top_p"),
]
BAD_VALUES = [
    *((name, value) for name in NOT_POSITIVE for value in (0, -1)),
    *((name, -1) for name in NEGATIVE),
    *((name, float("nan")) for name in ("learning_rate", "temperature", "kl_coef", "clip_range", "gamma", "top_p")),
    ("prompt_min_tokens", 0),
    ("prompt_min_tokens", 9),  # prompt_max_tokens is 8
    ("rollout_batch_size", 1),
    ("response_min_tokens", 0),
    ("response_min_tokens", 17),  # response_max_tokens is 16
    ("eos_min_tokens", 17),
    ("response_max_tokens", 0),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("adam_beta1", 1.0),
    ("adam_beta2", 1.0),
    ("gamma", 1.01),
    ("gae_lambda", 1.01),
    ("reward_scale", "odds"),
    ("learning_rate_schedule", "cosine"),
    ("report_to", ["mlflow"]),
    ("report_to", ["none", "wandb"]),
    ("wandb_log_model", True),  # without wandb
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_value_without_sense_is_refused_by_name(name, value):
    with pytest.raises(ConfigError) as caught:
        SECTION_OF[name](**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r}")
    assert "\n" not in message
    assert len(message) > len(f"{name}={value!r}: ") + 5, "the rule must follow"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 1.0),
        ("gamma", 1.0),
        ("gae_lambda", 0.0),
        ("kl_coef", 0.0),
        ("evaluation_prompts", 0),
        ("prompt_min_tokens", 8),
        ("response_min_tokens", 16),
        ("response_min_tokens", None),
        ("eos_min_tokens", 16),
        ("reward_clip", None),
        ("kl_early_stop", None),
        ("learning_rate", 1),
        ("min_review_characters", 0),
        ("lora_target_modules", ["c_attn"]),
    ],
)
def test_a_value_on_the_border_is_accepted(name, value):
    assert getattr(SECTION_OF[name](**{name: value}), name) == value


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("steps: many", "steps"),
        ("steps: 2.5", "steps"),
        ("steps: true", "steps"),
        ("steps: [1]", "steps"),
        ("seed: null", "seed"),
        ("learning_rate: [1.0, 2.0]", "learning_rate"),
        ("learning_rate: true", "learning_rate"),
        ("learning_rate: fast", "learning_rate"),
        ("use_peft: maybe", "use_peft"),
        ("use_peft: 3", "use_peft"),
        ("dataset: [a.csv]", "dataset"),
        ("dataset: {a: b}", "dataset"),
        ("lora_target_modules: [[c_attn]]", "lora_target_modules"),
        ("reward_clip: hard", "reward_clip"),
        ("reward_scale: odds", "reward_scale"),
        ("steps: 0", "steps"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_recipe_is_refused_by_name(capsys, recipe, line, name):
    error = refused(capsys, "--config", recipe(line))
    assert f"{name}=" in error
    assert str(yaml.safe_load(line)[name]).strip("[{}]'").split("'")[0].lower() in error.lower().replace("null", "none")


def test_an_unknown_key_of_a_recipe_is_named(capsys, recipe):
    assert "there is no setting stepz" in refused(capsys, "--config", recipe("steps: 3\nstepz: 4"))


@pytest.mark.parametrize("flag", ["--stepz", "--step"])
def test_an_unknown_or_abbreviated_flag_is_named(capsys, flag):
    assert f"unknown on the command line: {flag} 4" in refused(capsys, flag, "4")


def test_a_wrong_value_of_a_flag_is_named(capsys):
    assert "'soon'" in refused(capsys, "--steps", "soon")


def test_a_missing_recipe_is_named(capsys, tmp_path):
    assert str(tmp_path / "none.yaml") in refused(capsys, "--config", str(tmp_path / "none.yaml"))


def test_config_without_a_path_is_refused(capsys):
    assert "--config" in refused(capsys, "--config")


def test_the_recipe_can_be_given_with_an_equals_sign(recipe):
    config = parse(f"--config={recipe('steps: 3')}")
    assert (config.ppo.steps, config.run.output_dir) == (3, "runs/my_recipe")


@pytest.mark.parametrize(
    ("batch", "minibatch", "would_do"), [(100, 32, "96 or 128"), (20, 32, "32"), (33, 32, "32 or 64")]
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(batch, minibatch, would_do):
    with pytest.raises(ConfigError) as caught:
        parse("--rollout_batch_size", str(batch), "--minibatch_size", str(minibatch))
    expected = f"rollout_batch_size={batch} is not a multiple of minibatch_size={minibatch}; {would_do} would do."
    assert str(caught.value) == expected


def test_require_multiple_accepts_multiples():
    require_multiple("a", 64, "b", 32)
    require_multiple("a", 32, "b", 32)


def test_shares_of_the_workers_must_be_equal():
    config = default_config(rollout_batch_size=24, minibatch_size=12)
    for workers in (1, 2, 3, 4):
        require_divides_by_workers(config, workers)
    with pytest.raises(ConfigError, match=r"minibatch_size=12 is not a multiple of the number of workers=8; 8 or 16"):
        require_divides_by_workers(config, 8)
    with pytest.raises(ConfigError, match=r"rollout_batch_size=24 .* workers=5; 20 or 25"):
        require_divides_by_workers(config, 5)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults(recipe):
    config = parse("--config", recipe("steps: 3\nseed: 5"), "--seed", "6")
    assert (config.ppo.steps, config.run.seed, config.ppo.ppo_epochs) == (3, 6, 4)


def test_the_order_of_flags_and_recipe_does_not_matter(recipe):
    assert parse("--seed", "6", "--config", recipe("seed: 5")).run.seed == 6


def test_a_saved_recipe_read_back_is_the_same_run(tmp_path):
    settings = ["--lora_target_modules", "c_attn", "c_proj", "--use_peft", "--reward_clip", "2.5", "--seed", "7"]
    settings += ["--learning_rate", "3e-5", "--dataset", "a: b # c.csv", "--output_dir", str(tmp_path / "out")]
    config = parse(*settings, "--reward_scale", "log_odds")
    config.save(tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")).as_dict() == config.as_dict()


def test_saved_defaults_read_back_are_the_defaults(tmp_path):
    config = parse()
    config.save(tmp_path / "config.yaml")
    again = parse("--config", str(tmp_path / "config.yaml"))
    assert again == config
    assert again.as_dict() == default_config(output_dir="runs/run").as_dict()


def test_output_goes_to_runs_and_the_name_of_the_recipe(recipe):
    assert str(parse("--config", recipe("steps: 3")).output_dir) == "runs/my_recipe"


@pytest.mark.parametrize("where", ["recipe", "flag"])
def test_output_goes_where_the_run_says(recipe, where):
    text, flags = ("output_dir: here", []) if where == "recipe" else ("steps: 3", ["--output_dir", "here"])
    assert str(parse("--config", recipe(text), *flags).output_dir) == "here"


@pytest.mark.parametrize(
    ("line", "arguments", "trackers"),
    [
        ("seed: 1", (), []),
        ("report_to: none", (), []),
        ("report_to: wandb", (), ["wandb"]),
        ("report_to: [wandb, trackio]", (), ["wandb", "trackio"]),
        ("report_to: wandb", ("--report_to", "none"), []),
        ("seed: 1", ("--report_to", "tensorboard", "wandb", "wandb", "--seed", "3"), ["tensorboard", "wandb"]),
    ],
)
def test_trackers_are_none_one_or_several(recipe, line, arguments, trackers):
    assert parse("--config", recipe(line), *arguments).run.trackers == trackers
