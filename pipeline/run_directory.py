"""The output directory of a run: whose it is, whether an unfinished run in it goes on, what a new one moves aside."""

import fcntl
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import yaml

from pipeline.config import Config, ConfigError
from pipeline.models.saving import forget_policy
from pipeline.runtime.checkpoints import CheckpointError, all_checkpoints, damage_of, newest_whole

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
FINISHED = "finished"  # an empty file: the run has nothing left to do
EVALUATION_FILE = "evaluation.json"
EVALUATION_TEXT = "evaluation.md"
SAMPLES_FILE = "evaluation_samples.jsonl"
PLANE_FILE = "plane.png"
REPORT_FILE = "report.html"
# What a run's end leaves beside its model; once the run goes on it is of an earlier one.
OF_AN_END = (FINISHED, EVALUATION_FILE, EVALUATION_TEXT, SAMPLES_FILE, PLANE_FILE, REPORT_FILE)

# What may change between a checkpoint and the run that goes on from it; everything else changes the training.
FREE_TO_CHANGE = {
    "output_dir", "resume", "save_every_steps", "keep_last", "samples_every_steps", "profile", "evaluation_prompts",
    "report_to", "wandb_project", "wandb_log_model", "quiet", "microbatch_size", "rollout_microbatch_size",
    "reward_batch_size", "reward_timeout", "shard_reference", "gradient_checkpointing", "torch_compile", "frontier",
    "frontier_prompts", "frontier_samples",
}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint of this output directory or of another one, or (None) at the beginning."""

    checkpoint: Path | None
    in_place: bool  # the directory already holds the run that goes on


def plan_start(config: Config, say: Callable[[str], None]) -> Start:
    """Decide what `resume` means here. Changes nothing; reads whole checkpoints, so one worker is enough.

    Raises:
        ConfigError: the directory is not a run's, or the settings differ from the checkpoint's.
        CheckpointError: the checkpoint asked for is missing or damaged.
    """
    directory = config.output_dir
    check_output_dir(directory)
    if config.run.resume == "never":
        return Start(None, in_place=False)
    if config.run.resume == "auto":
        if (directory / FINISHED).exists():
            return Start(None, in_place=False)
        checkpoint = newest_whole(directory / CHECKPOINTS, say)
    else:
        checkpoint = _named(Path(config.run.resume), say)
    if checkpoint is None:
        return Start(None, in_place=False)
    check_same_training(checkpoint, config)
    return Start(checkpoint, in_place=checkpoint.parent.resolve() == (directory / CHECKPOINTS).resolve())


def _named(path: Path, say: Callable[[str], None]) -> Path:
    if (path / CHECKPOINTS).is_dir():
        path = path / CHECKPOINTS
    if all_checkpoints(path):
        newest = newest_whole(path, say)
        if newest is None:
            raise CheckpointError(f"resume={str(path)!r}: all checkpoints there are damaged.")
        return newest
    if not path.is_dir():
        raise CheckpointError(
            f"resume={str(path)!r}: there is no such checkpoint; give auto, never or the path of one."
        )
    damage = damage_of(path)
    if damage is not None:
        raise CheckpointError(f"resume={str(path)!r} is not a whole checkpoint: {damage}; resume an older one.")
    return path


def settings_of(checkpoint: Path) -> dict[str, object]:
    """The resolved settings of the run that wrote a checkpoint."""
    return yaml.safe_load((checkpoint / CONFIG_FILE).read_text(encoding="utf-8"))


def check_same_training(checkpoint: Path, config: Config) -> None:
    """Raise `ConfigError` with the differing settings where the run would not go on as it began."""
    saved = settings_of(checkpoint)
    different = differing_settings(saved, config)
    if different:
        changes = "; ".join(f"{name} was {then!r} and is {now!r}" for name, (then, now) in different.items())
        raise ConfigError(
            f"the run in {checkpoint.parent.parent} cannot go on from {checkpoint.name} with other settings: "
            f"{changes}. Restore them, or start over with --resume never, or choose another output_dir."
        )


def differing_settings(saved: Mapping[str, object], config: Config) -> dict[str, tuple[object, object]]:
    """Settings that decide the training and differ: name -> (then, now)."""
    free = set(FREE_TO_CHANGE)
    if config.ppo.learning_rate_schedule == "constant":
        free.add("steps")
    now = config.as_dict()
    return {
        name: (saved.get(name), now.get(name))
        for name in sorted({*saved, *now} - free)
        if name in saved and name in now and saved[name] != now[name]
    }


def check_output_dir(directory: Path) -> None:
    """Raise `ConfigError` where `directory`, or the place an earlier run in it moves to, holds something else."""
    if not directory.name:
        raise ConfigError(f"output_dir={str(directory)!r} must name a directory of its own, such as runs/mine.")
    for place in (directory, _previous(directory)):
        taken = place.exists() and (not place.is_dir() or any(place.iterdir()))
        if taken and not (place / CONFIG_FILE).is_file():
            raise ConfigError(
                f"output_dir={str(directory)!r}: {place} exists and is not a run of this program; choose another "
                f"output_dir or empty it."
            )


def lock_output_dir(directory: Path) -> TextIO:
    """Keep other runs out of `directory` as long as the file returned is open, or until this process ends.

    Raises:
        ConfigError: another run writes there; an earlier part of this one that was not ended, perhaps.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        file = directory.with_name(f".{directory.name}.lock").open("w")
    except OSError as error:
        raise ConfigError(f"output_dir={str(directory)!r} cannot be made: {error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(
            f"output_dir={str(directory)!r}: another run is writing there; wait for it, end it, or choose another."
        ) from error
    except OSError:  # a file system without locks
        pass
    return file


def claim_output_dir(directory: Path, start: Start, say: Callable[[str], None]) -> None:
    """Make `directory` ready: metrics of a resumed run end at its checkpoint, a run that is over moves aside.

    Where a run goes on in its own directory, the model and the evaluation it had when it was last ended are removed:
    they would pass for those of the later steps. Its checkpoints stay.

    Raises:
        ConfigError: see `check_output_dir`.
    """
    check_output_dir(directory)
    try:
        if not start.in_place and directory.exists() and any(directory.iterdir()):
            if _previous(directory).exists():
                shutil.rmtree(_previous(directory))
            directory.rename(_previous(directory))
            say(f"The run that was in {directory} is now in {_previous(directory)}, in place of any there.")
        directory.mkdir(parents=True, exist_ok=True)
        if start.checkpoint is not None:
            metrics = directory / METRICS_FILE
            aside = metrics.with_suffix(".writing")
            shutil.copyfile(start.checkpoint / METRICS_FILE, aside)
            aside.replace(metrics)
        if start.in_place:
            forget_policy(directory)
            for name in OF_AN_END:
                (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={str(directory)!r} cannot be made: {error}") from error


def check_shared(directory: Path) -> None:
    """Raise `ConfigError` on a worker that does not see the directory rank zero made."""
    if not directory.is_dir():
        raise ConfigError(
            f"output_dir={str(directory)!r} is not there on {platform.node()}: all nodes must share its file system."
        )


def check_disk(directory: Path, trainable: int, keep_last: int, *, frozen: int = 0) -> None:
    """Raise `ConfigError` unless the checkpoints of `trainable` float32 weights fit on the disk.

    A checkpoint holds these weights with Adam's two moments, and the `frozen` ones that the strategy writes too; one
    more than `keep_last` stands there while it is written.
    """
    there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    needed, free = 4 * (3 * trainable + frozen) * (keep_last + 1), shutil.disk_usage(there).free
    if needed > free:
        raise ConfigError(
            f"keep_last={keep_last} checkpoints and the one being written take {needed / 1e9:.1f} GB, and {there} has "
            f"{free / 1e9:.1f} GB free; lower keep_last, choose another output_dir or set save_every_steps to 0."
        )


def _previous(directory: Path) -> Path:
    return directory.with_name(directory.name + ".previous")
