"""Ending a run on request without losing what it learned."""

import os
import signal
import time

SAME_REQUEST_SECONDS = 1.0  # a launcher repeats the terminal's signal within milliseconds


class StopRequest:
    """Remembers SIGINT or SIGTERM; the loop asks at each step. A second SIGINT, a second later, exits at once."""

    def __init__(self):
        self.signal_name: str | None = None
        self._first = 0.0

    def install(self) -> None:
        """Take over SIGINT and SIGTERM; main thread only."""
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def _handle(self, number: int, _frame: object) -> None:
        if not self.requested:
            self.signal_name, self._first = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
