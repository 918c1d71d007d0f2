"""Ending a run on request without losing what it learned."""

import os
import signal
import time

SAME_REQUEST_SECONDS = 1.0  # a launcher repeats the terminal's signal within milliseconds


class StopRequest:
    """Remembers SIGINT or SIGTERM; the loop asks at each step. A second SIGINT, a second later, exits at once.

    As a context it takes over both signals and gives them back at the end; main thread only.
    """

    def __init__(self):
        self.signal_name: str | None = None
        self._first = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def _handle(self, number: int, _frame: object) -> None:
        if not self.requested:
            self.signal_name, self._first = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
