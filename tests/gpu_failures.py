"""Checks that go wrong, for test_gpu_benchmark.py: what the driver has to survive and to report."""

import os
import sys
import time

from benchmarks.gpu_checks.context import Context


def passes(context: Context) -> None:
    context.measure(device=context.device)
    context.require("one is one", True)


def fails(context: Context) -> None:
    context.require_below("error", 0.5, 0.1)


def raises(context: Context) -> None:
    context.measure(until="here")
    raise ZeroDivisionError("a fault in the program")


def dies(context: Context) -> None:
    print("the last line of a process that died", file=sys.stderr, flush=True)
    os._exit(7)


def hangs(context: Context) -> None:
    print("waiting for something that never comes", flush=True)
    time.sleep(600)


def cannot_be_rehearsed(context: Context) -> None:
    context.on_gpu("a part that needs CUDA")
