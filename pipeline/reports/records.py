"""What the directory of a run holds, as reports read it; whatever an older or unfinished run lacks is empty."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipeline.checked import ConfigError
from pipeline.foreign_text import without_secrets
from pipeline.rewards.protocol import RewardError
from pipeline.rewards.terms import classifier_of, parse_terms
from pipeline.run_directory import (
    CONFIG_FILE,
    EVALUATION_FILE,
    FINISHED,
    FREE_TO_CHANGE,
    METRICS_FILE,
    SAMPLES_FILE,
)
from pipeline.runtime.environment import read_parts

NAMED_SETTINGS = 3  # that differ, in the name of a group


@dataclass(frozen=True)
class Run:
    """One run."""

    directory: Path
    name: str
    config: dict[str, object]  # the resolved recipe, flat, without credentials in addresses
    steps: list[dict[str, float | None]]  # a PPO step's metrics each; None where one was not finite
    figures: dict[str, object] | None  # of the evaluation
    samples: list[dict[str, object]]  # of the evaluation, a held-out prompt each
    parts: list[dict[str, object]]  # what it ran on: one part, and one more each time it was resumed
    finished: bool

    def seconds(self, phase: str) -> float:
        """Seconds of all steps in a phase of `time/<phase>_seconds`."""
        return sum(step.get(f"time/{phase}_seconds") or 0.0 for step in self.steps)

    def part_of(self, step: int) -> dict[str, object] | None:
        """The part that took this step; the metrics of a run resumed from elsewhere may be older than all parts."""
        return next((part for part in reversed(self.parts) if part["after_step"] < step), None)

    @property
    def judged_label(self) -> str | None:
        """The label whose probability its classifier gave, if one did."""
        config = {**self.config, **(self.figures or {}).get("settings", {})}
        reward = config.get("reward", "sentiment")
        try:
            terms = parse_terms([reward] if isinstance(reward, str) else reward)
        except RewardError:  # of another version of the program
            return None
        if len(terms) == 1 and terms[0].kind == "classifier":
            return classifier_of(terms[0])[1]
        return config.get("reward_label") if any(term.kind == "sentiment" for term in terms) else None

    @property
    def outcome(self) -> str:
        """How it ended, or how far it is."""
        told = self.parts[-1]["outcome"] if self.parts else None
        if told:
            return told
        return "finished" if self.finished else f"not finished: {len(self.steps)} of {self.config.get('steps')} steps"


@dataclass(frozen=True)
class Group:
    """Runs of the same settings, which differ by their seed."""

    name: str
    runs: list[Run]


def read_run(directory: Path, name: str | None = None) -> Run:
    """Read a run's directory.

    Raises:
        ConfigError: it is not a run's, or a file in it is damaged.
    """
    if not (directory / CONFIG_FILE).is_file():
        raise ConfigError(f"{str(directory)!r} is not a run: it has no {CONFIG_FILE}.")
    try:
        config = without_secrets(yaml.safe_load((directory / CONFIG_FILE).read_text(encoding="utf-8")))
        evaluation = directory / EVALUATION_FILE
        figures = without_secrets(json.loads(evaluation.read_text(encoding="utf-8"))) if evaluation.is_file() else None
        samples = _lines(directory / SAMPLES_FILE)
        steps = _lines(directory / METRICS_FILE)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"a file of the run {str(directory)!r} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{str(directory / CONFIG_FILE)!r} holds no settings: {config!r}.")
    return Run(
        directory, name or directory.resolve().name, config, steps, figures, samples if figures else [],
        without_secrets(read_parts(directory)), (directory / FINISHED).is_file(),
    )  # fmt: skip


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Read several runs, each under a name that no other has; raises `ConfigError` as `read_run` does."""
    places = list(dict.fromkeys(directory.resolve() for directory in directories))
    for depth in (1, 2, 3):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            break
    else:
        names = [str(directory) for directory in dict.fromkeys(directories)]
    return [read_run(place, name) for place, name in zip(places, names, strict=True)]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs by their settings, in the order given; a group is named by the settings in which it differs from others."""
    keys: dict[str, list[Run]] = {}
    for run in runs:
        keys.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    groups = list(keys.values())
    varied = differing([_settings(members[0]) for members in groups])
    return [Group(_group_name(members, varied), members) for members in groups]


def differing(settings: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    """What is not the same in all of these settings: name -> its values, None where it is missing."""
    names = {name: None for own in settings for name in own}
    values = {name: [own.get(name) for own in settings] for name in names}
    return {name: own for name, own in values.items() if any(value != own[0] for value in own)}


def _settings(run: Run) -> dict[str, object]:
    """Those that decide the training, but for the seed."""
    return {name: value for name, value in run.config.items() if name not in FREE_TO_CHANGE | {"seed"}}


def _group_name(members: Sequence[Run], varied: Mapping[str, object]) -> str:
    if len(members) == 1:
        return members[0].name
    told = [f"{name}={members[0].config.get(name)}" for name in varied]
    if len(told) > NAMED_SETTINGS:
        told = [*told[:NAMED_SETTINGS], "…"]
    return f"{', '.join(told) or 'all runs'} ({len(members)} seeds)"


def _lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file; a last line that a killed run left half written is passed over."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number + 1 < len(lines):
                raise
    return rows
