"""Does everything work on this machine's GPUs, and how fast: one command, under eight minutes on one H100.

    python -m benchmarks.gpu                          # all checks; writes benchmarks/results/gpu.json
    python -m benchmarks.gpu --only kernels graphs    # some groups, or single checks: graphs/lora
    python -m benchmarks.gpu --list                   # their names
    python -m benchmarks.gpu --rehearse               # every check's code on the CPU at toy size

Each check runs in a process apart, against a time limit of its own; one that crashes or hangs is reported with its last
lines and does not stop the others. Checks of several GPUs are skipped where there is one. What a rehearsal cannot do
without CUDA is reported as not rehearsed. The models are the shipped ones or have random weights: no network.

Exit codes: 0 all passed; 1 one failed, crashed or took too long; 2 no GPU, or there is no such check.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu_checks import CHECKS, Check
from benchmarks.gpu_checks.processes import ROOT, Result, run_checks

FINE = ("passed", "skipped", "not rehearsed")


def main(arguments: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Groups, or checks as --list names them.")
    parser.add_argument("--list", action="store_true", help="Print the checks' names and stop.")
    parser.add_argument("--rehearse", action="store_true", help="Run every check's code on the CPU at toy size.")
    parser.add_argument("--output", type=Path, help="The JSON file; a rehearsal writes none unless this names one.")
    options = parser.parse_args(arguments)
    chosen = checks if options.only is None else _named(options.only, checks)
    if isinstance(chosen, str):
        print(f"benchmarks.gpu: {chosen}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(check.name for check in chosen))
        return 0
    missing = None if options.rehearse else _why_no_gpu()
    if missing is not None:
        print(f"benchmarks.gpu: no GPU ({missing}); --rehearse runs the checks' code on the CPU.", file=sys.stderr)
        return 2
    output = options.output or (None if options.rehearse else ROOT / "benchmarks/results/gpu.json")
    return _run(chosen, rehearse=options.rehearse, output=output)


def _named(names: Sequence[str], checks: Sequence[Check]) -> list[Check] | str:
    """The checks of these names or groups; a message where there is none."""
    known = {check.name for check in checks} | {check.name.split("/")[0] for check in checks}
    for name in names:
        if name not in known:
            groups = dict.fromkeys(check.name.split("/")[0] for check in checks)
            return f"there is no check {name!r}; the groups are {', '.join(groups)}, and --list names the checks."
    return [check for check in checks if check.name in names or check.name.split("/")[0] in names]


def _why_no_gpu() -> str | None:
    """Why PyTorch cannot use a GPU, or None where it can."""
    import torch  # --list and --help do without

    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch {torch.__version__}: {str(error).splitlines()[0].rstrip('.')}"
    return f"torch {torch.__version__} counts {torch.cuda.device_count()}"


def _run(checks: Sequence[Check], *, rehearse: bool, output: Path | None) -> int:
    """Run the checks, print a line for each, write the file after each; the exit code."""
    from pipeline.runtime.environment import environment

    found: dict[str, Result] = {}
    begin = time.monotonic()
    header = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "rehearsal": rehearse, **environment()}
    for name in ("started", "ended", "outcome", "workers", "nodes"):  # of a training
        header.pop(name, None)

    def report(check: Check, result: Result) -> None:
        found[check.name] = result
        print(_line(check.name, result), flush=True)
        if output is not None:
            summary = {"passed": _passed(found), "seconds": round(time.monotonic() - begin, 1)}
            output.write_text(json.dumps({**header, **summary, "checks": found}, indent=1) + "\n", encoding="utf-8")

    run_checks(checks, rehearse=rehearse, report=report)
    counts: dict[str, int] = {}
    for result in found.values():
        counts[result["status"]] = counts.get(result["status"], 0) + 1
    total = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"\n{total} in {time.monotonic() - begin:.0f} s" + (f"; written to {output}" if output else ""))
    return 0 if _passed(found) else 1


def _passed(found: dict[str, Result]) -> bool:
    return all(result["status"] in FINE for result in found.values())


def _line(name: str, result: Result) -> str:
    """A row of the table: name, status, seconds, and what went wrong or was left out; the rest of it below."""
    first, *rest = str(result["why"]).splitlines() or [""]
    if result["status"] == "passed" and first:
        first = f"not rehearsed: {first}"
    row = f"{name:34} {result['status']:13} {result['seconds']:6.1f} s  {first}".rstrip()
    return "\n".join([row, *(f"    {line}" for line in rest)])


if __name__ == "__main__":
    sys.exit(main())
