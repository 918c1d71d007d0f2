"""Work of the host and work of a GPU at the same time."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def alongside(device: torch.device, action: Callable[[], T]) -> Callable[[], T]:
    """Start `action` in a thread where `device` is a GPU; the callable returned waits for it and gives its result.

    On a CPU there is nothing to overlap with: two threads would share the same cores, so `action` runs when its result
    is asked for. What `action` raises is raised then, in the caller's thread.

    Autocast and gradient mode are a thread's own: `action` sets them itself.
    """
    if device.type == "cpu":
        return action
    return _in_thread(lambda: _on(device, action))


def _on(device: torch.device, action: Callable[[], T]) -> T:
    if device.index is not None:  # a thread begins with the first GPU, which is the one meant where there is no number
        torch.cuda.set_device(device)
    return action()


def _in_thread(action: Callable[[], T]) -> Callable[[], T]:
    outcome: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((action(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)  # must not keep a worker that failed alive
    thread.start()

    def result() -> T:
        thread.join()
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    return result
