"""Errors that are the user's to mend, and how a program ends on them."""

import atexit
import os
import platform
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from pipeline.foreign_text import shown

CRASHED = 1
BAD_SETTINGS = 2
REWARD_FAILED = 3
GUARD_STOPPED = 4
WRITE_FAILED = 5
STOPPED_BY_SIGNAL = 128  # plus the signal's number, as shells do: 130 SIGINT, 138 SIGUSR1, 143 SIGTERM

STATUS_FILE_VARIABLE = "PIPELINE_STATUS_FILE"


class UserError(Exception):
    """A setting, a file, a model or a reward is at fault; the message names it, the value and the remedy."""


class OtherWorkerError(UserError):
    """This worker is well, another one has a `UserError` and says so."""


class WriteError(UserError):
    """The disk is full, a limit is reached or a folder is read-only; the message names the file and the cause."""


class Stopped(UserError):
    """A signal asks the program to end."""

    def __init__(self, number: int, what: str = ""):
        """
        Args:
            number: of the signal.
            what: was done up to then, as the rest of a sentence.
        """
        super().__init__(f"Stopped by {signal.Signals(number).name}{what}.")
        self.number = number


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Turn a disk's refusal into a `WriteError` that says what could not be written, and why."""
    try:
        yield
    except Exception as error:
        why = disk_fault(error)
        if why is None:
            raise
        raise WriteError(f"{what} could not be written: {why}") from error


def disk_fault(error: BaseException) -> str | None:
    """Why a file could not be written, on one line; None where the error is another's."""
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return error.strerror or " ".join(str(error).split())
    # By name: the launcher reads this module before anything is installed. A damaged file is no fault of the disk.
    if type(error).__name__ == "SafetensorError" and "deserializ" not in str(error):
        message = re.search(r'message: "([^"]*)"', str(error))
        return message[1] if message else " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):  # which does not say why
        return "the disk is full, or a quota or a file-size limit (ulimit -f) is reached"
    return None


def leave(code: int, error: UserError | None = None) -> NoReturn:
    """End the program with `code` and, where there is an error, one `error:` line.

    Under launch.sh the first worker that leaves writes both into a file instead, for launch.sh to tell when all have
    ended: a launcher would answer an exit code by killing the workers that have not ended yet, and with a traceback.
    """
    told = os.environ.get(STATUS_FILE_VARIABLE)
    if isinstance(error, OtherWorkerError):
        _end(0 if told else code)
    message = "" if error is None else f"error: {shown(str(error))}\n"
    if not told:
        print(message, end="", file=sys.stderr, flush=True)
        _end(code)
    try:
        with open(told, "x", encoding="utf-8") as file:
            file.write(f"{code}\n{message}")
    except FileExistsError:
        pass
    _end(0)


def end_worker() -> None:
    """End one of several workers that has done its part; a process alone ends by itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _end(0)


def _end(code: int) -> NoReturn:
    """Exit; one of several workers does so without unloading PyTorch, whose communication threads may abort in that."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def worker_faults() -> Iterator[None]:
    """Let a worker that fails say which it is, in one piece, and end at once: the others wait for it in a collective.

    A process alone fails as any program does.
    """
    try:
        yield
    except Exception:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        who = f"worker {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} on {platform.node()}"
        sys.stdout.flush()
        sys.stderr.write(f"{who} failed:\n{shown(traceback.format_exc())}")
        sys.stderr.flush()
        os._exit(CRASHED)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a `UserError` into one line and exit code 2, or the code of a write that failed or of the signal."""
    try:
        yield
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr, flush=True)
        leave(STOPPED_BY_SIGNAL + stopped.number)
    except UserError as error:
        leave(WRITE_FAILED if isinstance(error, WriteError) else BAD_SETTINGS, error)
