"""Ending a run on request without losing what it learned."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from pipeline.errors import Stopped
from pipeline.runtime.distributed import agreed_signal

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

    def check(self, accelerator: Accelerator) -> None:
        """Raise `Stopped` on all workers where a signal reached any of them: collective."""
        number = agreed_signal(accelerator, self.signal_number)
        if number:
            raise Stopped(number)

    def _handle(self, number: int, _frame: object) -> None:
        if not self.requested:
            self.signal_number, self._first = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first > SAME_REQUEST_SECONDS:
            os._exit(128 + number)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """For a command of one process that has nothing to save: SIGINT, SIGTERM and SIGUSR1 raise `Stopped` at once."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
