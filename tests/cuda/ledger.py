"""Counts of what a device was asked to do, and by whom."""

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROJECT = str(Path(__file__).parents[2] / "pipeline")


class Ledger:
    """Operations, copies and waits by label; whatever other threads do is under `thread`."""

    def __init__(self):
        self.label = "start"
        self.launches: Counter[str] = Counter()  # by label
        self.operations: Counter[tuple[str, str]] = Counter()  # by label and name
        self.waits: list[str] = []  # of the host for the device: "label: operation at file:line"
        self.copies: list[str] = []  # from the host, without waiting
        self.graphs: list = []  # captured

    def clear(self) -> None:
        """Reset the counts; graphs stay."""
        for counts in (self.launches, self.operations, self.waits, self.copies):
            counts.clear()

    @contextmanager
    def under(self, label: str) -> Iterator[None]:
        """Count what the main thread does inside under `label`."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def launch(self, operation: str) -> None:
        self.launches[self._who()] += 1
        self.operations[self._who(), operation] += 1

    def wait(self, operation: str) -> None:
        self.waits.append(f"{self._who()}: {operation} at {caller()}")

    def copy(self, operation: str) -> None:
        self.copies.append(f"{self._who()}: {operation} at {caller()}")

    def _who(self) -> str:
        return self.label if threading.current_thread() is threading.main_thread() else "thread"


def caller() -> str:
    """The innermost three lines of the project and of transformers that led here."""
    frame, places = sys._getframe(1), []
    while frame is not None and len(places) < 3:
        name = frame.f_code.co_filename
        if name.startswith(PROJECT) or "/transformers/" in name:
            places.append(f"{os.path.basename(name)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(places)
