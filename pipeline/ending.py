"""How a run ends: its last words, the mark that it is finished, its exit code."""

import signal

from pipeline.config import Config
from pipeline.errors import (
    BAD_SETTINGS,
    GUARD_STOPPED,
    REWARD_FAILED,
    STOPPED_BY_SIGNAL,
    WRITE_FAILED,
    UserError,
    WriteError,
    writing,
)
from pipeline.guards import GuardError
from pipeline.reporting import Reporter
from pipeline.run_directory import FINISHED
from pipeline.runtime.checkpoints import CheckpointError, Checkpoints, newest_whole
from pipeline.runtime.distributed import on_main
from pipeline.trainer import PPOTrainer


def stopped_line(trainer: PPOTrainer, kept: int | None, what: str = "") -> str:
    """What stopped the run, and where the same command goes on.

    Args:
        kept: the step of the newest checkpoint, None without any.
        what: was going on after training, where that was over.
    """
    steps = f"{trainer.finished} of {trainer.config.ppo.steps} steps"
    where = f"in the {what} after {steps}" if what else f"after {steps}"
    place = f"after step {kept}" if kept else "from the start"
    if kept == trainer.finished:
        place = f"from there: it makes the {what} again, and trains no more" if what else "from there"
    return f"Stopped by {signal.Signals(trainer.stopped_by).name} {where}. The same command goes on {place}."


def end(trainer: PPOTrainer, reporter: Reporter, config: Config, failure: UserError | None) -> UserError | None:
    """Write what tells of the run; where all was written, the mark that it is finished. Returns the run's error."""

    def write() -> None:
        reporter.end(outcome(trainer, failure))
        if failure is None and not trainer.stopped_by:
            reporter.finished()
            with writing(config.output_dir / FINISHED):
                (config.output_dir / FINISHED).touch()

    try:
        on_main(trainer.accelerator, write)
    except UserError as error:
        if failure is None and not trainer.stopped_by:
            return error
        reporter.console.warn(str(error))
    return failure


def exit_code(trainer: PPOTrainer, failure: UserError | None) -> int:
    """The code of a run that ended with `failure`, by a signal or well."""
    if isinstance(failure, GuardError):
        return GUARD_STOPPED
    if isinstance(failure, WriteError | CheckpointError):
        return WRITE_FAILED if trainer.finished else BAD_SETTINGS
    if failure is not None:
        return REWARD_FAILED
    return STOPPED_BY_SIGNAL + trainer.stopped_by if trainer.stopped_by else 0


def go_back(trainer: PPOTrainer, checkpoints: Checkpoints) -> str:
    """Give the policy back its newest checkpoint, which is of before the first bad step; returns what was done."""
    last_good = on_main(trainer.accelerator, lambda: newest_whole(checkpoints.directory, print))
    if last_good is None:
        return "There is no checkpoint to go back to: the model saved is the spoilt one."
    trainer.restore(checkpoints.load(last_good)["trainer"])
    return f"Back to the last good state, after step {trainer.finished}: {last_good}"


def outcome(trainer: PPOTrainer, failure: UserError | None) -> str:
    """How the run ended."""
    steps = f"{trainer.finished} of {trainer.config.ppo.steps} steps"
    if failure is not None:
        return f"ended after {steps}: {failure}"
    if trainer.stopped_by:
        return f"stopped by {signal.Signals(trainer.stopped_by).name} after {steps}"
    return "finished"
