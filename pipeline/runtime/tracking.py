"""Where rank zero writes a run's figures: `metrics.jsonl`, and the trackers asked for (runtime/trackers.py)."""

import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pipeline.runtime.trackers import OPEN, Run, Tracker

SAMPLES = "samples"
MOST_SAMPLES = 2000  # rows of the growing table; the oldest go


class MetricsFile:
    """One JSON object a step, written at once so that a killed run keeps its history.

    Lines that a full disk refuses wait in memory and are written with the next one that finds room.
    """

    def __init__(self, path: Path, *, append: bool = False):
        if not append:
            path.write_bytes(b"")
        self._file = path.open("ab", buffering=0)
        self.waiting: list[bytes] = []  # lines not written yet

    def write(self, metrics: dict[str, float]) -> None:
        """Add a step's line; raises `OSError` where the disk refuses it."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.waiting.append(json.dumps(finite).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write what waits, line by line and each whole or not at all; raises `OSError`."""
        while self.waiting:
            line, end, done = self.waiting[0], self._file.seek(0, os.SEEK_END), 0
            try:
                while done < len(line):  # a full disk takes a part first
                    done += self._file.write(line[done:])
            except OSError:
                self._file.truncate(end)
                raise
            del self.waiting[0]

    def close(self) -> None:
        self._file.close()


class Trackers:
    """The trackers of a run as one. One that fails is told of once and left out from then on; it never stops a run."""

    def __init__(
        self,
        names: Iterable[str],
        *,
        project: str,
        name: str,
        config: Mapping[str, object],
        directory: Path,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        state: Mapping[str, object] | None = None,
    ):
        """
        Args:
            names: of `OPEN`.
            directory: of the run; wandb and TensorBoard write below it.
            say, warn: told where the run is to be seen, and of failures.
            state: what `state` gave in an earlier part of the same run, which then goes on under its id.
        """
        resumed, state = state is not None, state or {"id": uuid.uuid4().hex[:8], "step": 0, "samples": []}
        self._id, self._step, self._samples = state["id"], state["step"], list(state["samples"])
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        run = Run(project, name, self._id, dict(config), directory, resumed, self._step, say)
        for tracker in names:
            try:
                self._open[tracker] = OPEN[tracker](run)
            except Exception as error:  # a tracker must not cost anyone a run
                self._failed(tracker, "could not start", error)

    def state(self) -> dict[str, object]:
        """What goes on after the last step: the run's id and the rows of its table."""
        return {"id": self._id, "step": self._step, "samples": self._samples}

    def log(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Tensor]) -> None:
        """Log a step's scalars and the distributions (N,) of some of them; steps count from 1 and only go up."""
        self._step = step
        arrays = {name: values.cpu().numpy() for name, values in histograms.items()}
        self._each(lambda tracker: tracker.log(step, metrics, arrays))

    def samples(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add rows to the growing table of samples, under the step that was logged last."""
        added = [[self._step, *row] for row in rows]
        self._samples = (self._samples + added)[-MOST_SAMPLES:]
        columns = ["step", *columns]
        self._each(lambda tracker: tracker.table(
            self._step, SAMPLES, columns, self._samples if tracker.shows_last_table else added))  # fmt: skip

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Log a table under the step that was logged last."""
        self._each(lambda tracker: tracker.table(self._step, name, columns, rows))

    def summary(self, name: str, figures: Mapping[str, object]) -> None:
        """Store figures (nested) of the run as a whole."""
        self._each(lambda tracker: tracker.summary(self._step, name, figures))

    def model(self, files: Sequence[Path]) -> None:
        """Give the files of the final model to the trackers that keep such."""
        self._each(lambda tracker: tracker.model(files))

    def finish(self, *, failed: bool) -> None:
        """Close the run."""
        self._each(lambda tracker: tracker.finish(failed=failed))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._open[name]
                self._failed(name, "failed", error)

    def _failed(self, name: str, how: str, error: Exception) -> None:
        self._warn(f"{name} {how} ({error}); the run goes on without it.")
