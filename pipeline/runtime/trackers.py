"""wandb, TensorBoard and Trackio: Accelerate's trackers, and what each needs beside scalars."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from pipeline.foreign_text import markdown_text, without_secrets


@dataclass(frozen=True)
class Run:
    """What a tracker is told of the run."""

    project: str
    name: str
    id: str  # the same when the run goes on
    config: dict[str, object]
    directory: Path
    resumed: bool
    step: int  # the last one logged before, if any
    say: Callable[[str], None]


class Tracker:
    """One of Accelerate's trackers, started. Its methods may raise whatever the tracker raises."""

    shows_last_table = False  # else a table of each step has its own place

    def __init__(self, tracker: GeneralTracker):
        self._tracker = tracker
        tracker.start()

    def log(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        """Log scalars and distributions."""
        raise NotImplementedError

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Log a table; no step may be before the last one logged."""
        raise NotImplementedError

    def summary(self, step: int, name: str, figures: Mapping[str, object]) -> None:
        """Store nested figures of the whole run; by default the numbers among them as scalars of `step`."""
        self._tracker.log(dict(_numbers(name, figures)), step=step)

    def model(self, files: Sequence[Path]) -> None:
        """Keep a model's files, where the tracker can."""

    def finish(self, *, failed: bool) -> None:
        """Close the run."""
        self._tracker.finish()


class Wandb(Tracker):
    """Without a login it works offline instead of asking; WANDB_MODE is heeded."""

    shows_last_table = True

    def __init__(self, run: Run):
        import wandb

        self._wandb, self._name = wandb, run.name
        mode = None
        if "WANDB_MODE" not in os.environ and not _logged_in(wandb):
            mode = "offline"
            run.say(f"wandb: not logged in, so the run is kept offline under {run.directory / 'wandb'}; "
                    f"`wandb login` and `wandb sync` upload it.")  # fmt: skip
        # Frames of the live picture are no log: on a terminal wandb would keep hundreds of megabytes of them.
        settings = wandb.Settings(silent=True, console="off" if sys.stdout.isatty() else "auto")
        arguments, sys.argv = sys.argv, without_secrets(sys.argv)  # which it writes down
        try:
            super().__init__(
                WandBTracker(
                    run.project,
                    name=run.name,
                    id=run.id,
                    resume="allow",
                    config=run.config,
                    dir=str(run.directory),
                    mode=mode,
                    settings=settings,
                )
            )
        finally:
            sys.argv = arguments

    def log(self, step, metrics, histograms):
        drawn = {name: self._wandb.Histogram(values) for name, values in histograms.items()}
        self._tracker.log({**metrics, **drawn}, step=step)

    def table(self, step, name, columns, rows):
        # Into the row that is open: a resumed run's is a new one, and `step` would be refused as one of the past.
        self._tracker.log_table(name, columns=list(columns), data=[list(row) for row in rows], commit=False)

    def summary(self, step, name, figures):
        self._tracker.tracker.summary.update({name: figures})

    def model(self, files):
        artifact = self._wandb.Artifact(re.sub(r"[^\w.-]", "-", self._name), type="model")
        for path in files:
            artifact.add_file(str(path))
        self._tracker.tracker.log_artifact(artifact)

    def finish(self, *, failed):
        self._tracker.tracker.finish(exit_code=int(failed))


class TensorBoard(Tracker):
    """Event files in <run>/tensorboard; tables as Markdown."""

    def __init__(self, run: Run):
        directory = run.directory / "tensorboard"
        run.say(f"tensorboard: `tensorboard --logdir {directory}` shows the run.")
        # What a run that was cut off logged after its last checkpoint comes again, and is hidden.
        super().__init__(TensorBoardTracker("", directory, purge_step=run.step + 1))
        if not run.resumed:
            plain = {n: v if isinstance(v, bool | int | float | str) else str(v) for n, v in run.config.items()}
            self._tracker.store_init_configuration(plain)

    def log(self, step, metrics, histograms):
        for name, values in histograms.items():
            self._tracker.tracker.add_histogram(name, values, step)
        self._tracker.log(dict(metrics), step=step)

    def table(self, step, name, columns, rows):
        cells = [[_cell(value) for value in row] for row in (columns, *rows)]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        self._tracker.log({name: "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])}, step=step)


class Trackio(Tracker):
    """In Trackio's own folder (TRACKIO_DIR), where its dashboard finds all runs of a project; no network."""

    def __init__(self, run: Run):
        import trackio

        self._trackio = trackio
        run.say(f"trackio: `trackio show --project {run.project}` shows the run.")
        name = f"{run.name}-{run.id}"  # Trackio knows a run that goes on by its name
        stored = trackio.SQLiteStorage.get_max_step_for_run(run.project, name) if run.resumed else None
        self._stored = stored or 0
        with redirect_stdout(StringIO()):  # it talks
            resume = "allow" if run.resumed else "never"
            super().__init__(TrackioTracker(run.project, name=name, config=run.config, resume=resume, embed=False))

    def log(self, step, metrics, histograms):
        if step > self._stored:  # the same again after a run was cut off: Trackio would show both
            numbers = {name: value for name, value in metrics.items() if name != "step"}  # a word of Trackio's own
            drawn = {name: self._trackio.Histogram(values) for name, values in histograms.items()}
            self._tracker.log(numbers | drawn, step=step)

    def table(self, step, name, columns, rows):
        self._tracker.log({name: self._trackio.Table(columns=list(columns), data=list(rows))}, step=step)

    def finish(self, *, failed):
        with redirect_stdout(StringIO()):
            self._trackio.finish()  # the tracker's own would be done again at the program's end


OPEN: dict[str, Callable[[Run], Tracker]] = {"wandb": Wandb, "tensorboard": TensorBoard, "trackio": Trackio}


def _numbers(name: str, figures: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{name}/{key}", value)
        elif isinstance(value, int | float):
            yield f"{name}/{key}", value


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else markdown_text(str(value))


def _logged_in(wandb) -> bool:
    """Whether there are credentials, without ever asking for them."""
    try:
        return bool(wandb.login(prompt=False))
    except Exception:
        return False
