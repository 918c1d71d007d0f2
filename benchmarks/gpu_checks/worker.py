"""A process that runs checks one after another and appends what each found to a file, a line of JSON each.

    python -m benchmarks.gpu_checks.worker REPORT [--rehearse] MODULE:FUNCTION …

A check that raises is the last one of its process: after a fault of CUDA nothing that follows can be believed.
"""

import argparse
import gc
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from benchmarks.gpu_checks.context import Context

ERROR_LINES = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("checks", nargs="+", metavar="MODULE:FUNCTION")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    with arguments.report.open("a", encoding="utf-8") as report, tempfile.TemporaryDirectory() as folder:

        def write(**entry: object) -> None:
            report.write(json.dumps(entry) + "\n")
            report.flush()

        for check in arguments.checks:
            name, function = check.split(":")
            module = importlib.import_module(name)
            sys.stdout.flush()
            write(check=check, log_bytes=os.fstat(sys.stdout.fileno()).st_size)  # where in the log it begins
            context, start, error = Context(Path(folder), rehearsal=arguments.rehearse), time.monotonic(), None
            try:
                getattr(module, function)(context)
            except Exception:
                error = "\n".join(traceback.format_exc().splitlines()[-ERROR_LINES:])
            write(check=check, result=context.result(time.monotonic() - start, error))
            if error is not None:
                sys.exit(1)
            clear()


def clear() -> None:
    """Free what the check before left on the device."""
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


if __name__ == "__main__":
    main()
