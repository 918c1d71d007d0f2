"""Ending a run on request without losing what it learned."""

import os
import signal
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 1.0  # a launcher repeats the terminal's signal within milliseconds


class StopRequest:
    """Remembers the first of SIGINT (Ctrl-C), SIGTERM (preemption, scancel) and SIGUSR1 (SLURM: time is nearly up).

    The loop asks at each step. A second SIGINT, a second later, exits at once. As a context it takes over the signals
    and gives them back at the end; main thread only.
    """

    def __init__(self):
        self.signal_number = 0  # 0: none came
        self._first = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        return self.signal_number != 0

    def _handle(self, number: int, _frame: object) -> None:
        if not self.requested:
            self.signal_number, self._first = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
