"""Where rank zero writes a run's figures: `metrics.jsonl`, and wandb when asked."""

import json
import math
import os
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


class MetricsFile:
    """One JSON object a step, flushed at once so that a killed run keeps its history."""

    def __init__(self, path: Path, *, append: bool = False):
        self._file = path.open("a" if append else "w", encoding="utf-8")

    def write(self, metrics: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        json.dump(finite, self._file)
        self._file.write("\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class WandbTracker:
    """Scalars, the reward histogram and a table of samples.

    Without a login it works offline instead of asking; a failure of wandb is reported once and never stops the run.
    """

    def __init__(
        self,
        *,
        project: str,
        name: str,
        config: dict[str, object],
        directory: Path,
        state: Mapping[str, object] | None = None,
    ):
        """
        Args:
            state: what `state` gave in an earlier part of the same run, which then goes on under its id.
        """
        self._run = None
        self._id = None if state is None else state["id"]
        self._samples: list[list[object]] = [] if state is None else list(state["samples"])
        try:
            import wandb

            self._wandb = wandb
            settings = wandb.Settings(silent=True)
            mode = None
            if "WANDB_MODE" not in os.environ and not _logged_in(wandb):
                mode = "offline"
                print(f"wandb: not logged in, so the run is kept offline under {directory / 'wandb'}; "
                      f"`wandb login` and `wandb sync` upload it.", flush=True)  # fmt: skip
            self._id = self._id or uuid.uuid4().hex[:8]
            self._run = wandb.init(
                project=project,
                name=name,
                id=self._id,
                resume="allow",
                config=config,
                dir=str(directory),
                mode=mode,
                settings=settings,
            )
        except Exception as error:  # a tracker must not cost anyone a run
            warnings.warn(f"wandb could not start ({error}); the run goes on without it.", stacklevel=2)

    def state(self) -> dict[str, object]:
        """The run's id and the rows of its table."""
        return {"id": self._id, "samples": self._samples}

    def log(self, step: int, metrics: dict[str, float], scores: Tensor) -> None:
        """Log a step's scalars and the histogram of its scores (N,)."""
        self._try(lambda: self._run.log(
            {**metrics, "reward/histogram": self._wandb.Histogram(scores.cpu().numpy())}, step=step))  # fmt: skip

    def log_samples(self, step: int, rows: list[tuple[str, str, float]]) -> None:
        """Add (prompt, response, score) rows to the growing table of samples."""
        self._samples += [[step, *row] for row in rows]
        columns = ["step", "prompt", "response", "score"]
        self._try(lambda: self._run.log(
            {"samples": self._wandb.Table(columns=columns, data=self._samples)}, step=step))  # fmt: skip

    def log_evaluation(self, figures: dict[str, object], samples: list[list[str]]) -> None:
        """Store the comparison before/after in the run's summary, and its samples (header first) as a table."""
        columns = ["prompt", "before", "before score", "after", "after score"]
        self._try(lambda: self._run.summary.update({"evaluation": figures}))
        self._try(lambda: self._run.log({"before and after": self._wandb.Table(columns=columns, data=samples[1:])}))

    def finish(self) -> None:
        """Close the run."""
        self._try(lambda: self._run.finish())

    def _try(self, action) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            self._run = None
            warnings.warn(f"wandb failed ({error}); the run goes on without it.", stacklevel=3)


def _logged_in(wandb) -> bool:
    """Whether there are credentials, without ever asking for them."""
    try:
        return bool(wandb.login(prompt=False))
    except Exception:
        return False
