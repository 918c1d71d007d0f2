"""Compare a finished run's model with the original on held-out prompts, or hold the run against what people prefer.

    python -m pipeline.evaluate runs/quickstart
    python -m pipeline.evaluate runs/quickstart --evaluation_prompts 2000
    python -m pipeline.evaluate runs/quickstart --preferences pairs.jsonl
    python -m pipeline.evaluate runs/quickstart --judge-file judge.csv
    python -m pipeline.evaluate runs/quickstart --read-marks judge.csv

The run's own config.yaml says how; settings given here win over it. The first two print the comparison and write
evaluation.json, .md and _samples.jsonl, plane.png and report.html into the run's directory, as the end of every
training does. The others, each in place of it (docs/preferences.md has the formats):

    --preferences FILE   how reward and likelihoods agree with people's choices or ratings: preferences.json and .md
    --judge-file FILE    a sheet of blinded pairs of both models' responses for people to mark, and its key beside it
    --read-marks FILE    the marked sheet as the tuned model's win rate: marks.json and .md

A run whose reward is a function or a server's is evaluated only with --trust: it may be somebody else's.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator

from pipeline.assembly import (
    Data,
    Parts,
    choose_rollout_microbatch,
    make_reward,
    open_data,
    open_frontier,
    open_reward,
    open_run,
    open_tuned,
)
from pipeline.config import Config, ConfigError
from pipeline.data.preferences import read_preferences
from pipeline.errors import end_worker, user_errors
from pipeline.evaluation import evaluate
from pipeline.foreign_text import without_secrets
from pipeline.inputs import check_same_texts
from pipeline.judging import key_path, marks_table, read_marks, samples_digest, write_judge_file, write_marks
from pipeline.models.vocabulary import load_config_and_tokenizer
from pipeline.preferences import agreement, preferences_table, write_preferences
from pipeline.reporting import show_evaluation, write_report
from pipeline.rewards.composed import ComposedReward
from pipeline.run_directory import differing_settings, settings_of
from pipeline.runtime.console import Console
from pipeline.runtime.distributed import all_or_none, make_accelerator, on_main
from pipeline.runtime.signals import StopRequest, stopping_at_once
from pipeline.trust import check_trust


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:2]):
        print(__doc__)
        return
    with user_errors(), StopRequest() as stop:
        run, people, config = read_arguments(sys.argv[1:])
        preferences = None if people.preferences is None else read_preferences(people.preferences)
        accelerator = make_accelerator(config.run.mixed_precision)
        console = Console(0, enabled=accelerator.is_main_process)
        if people.judge_file is not None:
            pairs = on_main(accelerator, lambda: write_judge_file(run, people.judge_file))
            console.say(
                f"{pairs} pairs written to {people.judge_file}: write a, b or tie into the column better, as many rows "
                f"as you like, from the top.\nKeep {key_path(people.judge_file)} from whoever marks."
            )
        elif people.read_marks is not None:
            rate = on_main(accelerator, lambda: read_marks(people.read_marks))
            if rate.samples not in (None, samples_digest(run)):
                console.warn(
                    f"{people.read_marks} was not written from the samples that {run} has now: it is another run's, or "
                    f"from before this one was evaluated anew."
                )
            console.table("What people marked", marks_table(rate))
            on_main(accelerator, lambda: write_marks(rate, run))
        elif preferences is not None:
            reward, policy, reference, tokenizer = all_or_none(
                accelerator,
                lambda: (
                    judge_of(config, accelerator),
                    *open_tuned(run, config, accelerator.device),
                    load_config_and_tokenizer(config.model.model_path)[1],
                ),
            )
            choose_rollout_microbatch(config, accelerator, policy, len(preferences))
            stop.check(accelerator)
            with stopping_at_once() if accelerator.num_processes == 1 else nullcontext():
                figures = agreement(accelerator, policy, reference, reward, tokenizer, preferences, config)
            stop.check(accelerator)
            console.table("Agreement with people", preferences_table(figures))
            on_main(accelerator, lambda: write_preferences(figures, run))
        else:
            data, parts = all_or_none(accelerator, lambda: prepare(run, config, accelerator))
            for note in data.training.notes:
                console.say(note)
            choose_rollout_microbatch(config, accelerator, parts.policy, config.run.evaluation_prompts)
            evaluation = evaluate(
                accelerator, parts.policy, parts.reference, parts.reward, data.tokenizer, data.held_out, config,
                parts.frontier, lambda: stop.check(accelerator),
            )  # fmt: skip
            other = differing_settings(settings_of(run), config)
            evaluation.figures["settings"] = {name: without_secrets(now) for name, (_then, now) in other.items()}
            on_main(accelerator, lambda: show_evaluation(console, evaluation, run))
            on_main(accelerator, lambda: write_report(console, run))
        accelerator.wait_for_everyone()
    end_worker()


def read_arguments(arguments: list[str]) -> tuple[Path, argparse.Namespace, Config]:
    """Read the run's directory, the files of what people prefer and the settings; raises `ConfigError`."""
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError("name the run to evaluate: python -m pipeline.evaluate runs/quickstart [--setting value …]")
    people, settings = people_options(arguments[1:])
    run, config = open_run(__doc__, arguments[0], settings)
    of_people = people.judge_file or people.read_marks
    if config.run.evaluation_prompts < 1 and not (of_people or people.preferences):
        raise ConfigError("evaluation_prompts=0 leaves nothing to evaluate; give --evaluation_prompts 512.")
    named_here = any(word == "--reward" or word.startswith("--reward=") for word in settings)
    if not of_people:  # else no reward is loaded
        check_trust(run, config, trusted=people.trust or named_here)
    return run, people, config


def people_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Take --trust out of the arguments, and of --preferences, --judge-file and --read-marks the one that is given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    group = parser.add_mutually_exclusive_group()
    for name in ("preferences", "judge_file", "read_marks"):
        group.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name, type=Path, metavar="FILE")
    parser.add_argument("--trust", action="store_true")
    try:
        return parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; --help shows how.") from error


def judge_of(config: Config, accelerator: Accelerator) -> ComposedReward:
    """Load the reward, which must have a component that judges texts by themselves; raises `UserError`."""
    reward = make_reward(config, accelerator.device)
    reward.try_texts(["This"], [" film"])
    reward.of_texts_alone(["This"], [" film"])
    return reward


def prepare(run: Path, config: Config, accelerator: Accelerator) -> tuple[Data, Parts]:
    """Load the prompts, the reward and both models; raises `UserError`."""
    data = open_data(config)
    check_same_texts(run, config, data.training, data.held_out)
    reward = open_reward(config, data, accelerator.device)
    policy, reference = open_tuned(run, config, accelerator.device)
    return data, Parts(policy, reference, reward, open_frontier(config, data, reference))


if __name__ == "__main__":
    main()
