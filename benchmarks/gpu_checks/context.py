"""What a check is given, and what it leaves behind."""

import math
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class Context:
    """Where a check runs and at what size; it takes what the check found, also of one that crashes half-way.

    On a GPU the device is "cuda" without an index, as Accelerate's is in a single process.
    """

    def __init__(self, folder: Path, *, rehearsal: bool):
        """
        Args:
            folder: scratch space, shared by the checks of one worker process.
            rehearsal: the check's code runs on the CPU at toy size.
        """
        self.folder, self.rehearsal = folder, rehearsal
        self.device = "cpu" if rehearsal else "cuda"
        self.measured: dict[str, object] = {}
        self.conditions: dict[str, bool] = {}
        self.not_rehearsed: list[str] = []
        self.skipped: str | None = None  # why nothing of it could run on this machine

    def sized(self, full: T, toy: T) -> T:
        """`full` on a GPU, `toy` in a rehearsal."""
        return toy if self.rehearsal else full

    def measure(self, **values: object) -> None:
        """Keep figures by name."""
        self.measured.update(values)

    def require(self, condition: str, holds: object) -> None:
        """Keep whether `condition` holds; one that does not fails the check."""
        self.conditions[condition] = bool(holds)

    def require_below(self, name: str, value: float, limit: float, *, where: str = "") -> None:
        """Keep a figure and require it to be less than `limit`; NaN is not."""
        key = f"{name}, {where}" if where else name
        self.measured[key] = value
        self.require(f"{key} < {limit:g}", value < limit)

    def on_gpu(self, what: str) -> bool:
        """Whether this is a GPU; in a rehearsal `what` is reported as not rehearsed."""
        if self.rehearsal:
            self.not_rehearsed.append(what)
        return not self.rehearsal

    def result(self, seconds: float, error: str | None = None) -> dict[str, object]:
        """The check's entry in the JSON file."""
        failed = [condition for condition, holds in self.conditions.items() if not holds]
        if error is not None:
            status = "crashed"
        elif failed:
            status = "failed"
        elif self.skipped is not None:
            status = "skipped"
        else:
            status = "passed" if self.conditions or self.measured else "not rehearsed"
        return {
            "status": status,
            "seconds": round(seconds, 2),
            "why": error or "; ".join(failed) or self.skipped or "; ".join(self.not_rehearsed),
            "measured": plain(self.measured),
            "conditions": self.conditions,
            "not_rehearsed": self.not_rehearsed,
        }


def plain(value: object) -> object:
    """Figures as JSON has them: floats to five digits, NaN and infinities as text."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)
