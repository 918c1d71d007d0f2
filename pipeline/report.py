"""Make the report of a run again, or compare several runs.

    python -m pipeline.report runs/quickstart                        # writes runs/quickstart/report.html
    python -m pipeline.report runs/seeds/quickstart/* --to all.html  # several: seeds with their spread

A report is one HTML file that needs no network: charts of the training, scores before and after, the plane of KL and
reward, all samples of the evaluation, time and cost, settings, hardware and versions. Every training ends with one.
Runs that differ in their seed alone are shown together. Without --to a comparison goes to runs/comparison.html.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.checked import ConfigError
from pipeline.errors import user_errors
from pipeline.reports.page import comparison_page, run_page
from pipeline.reports.records import read_run, read_runs
from pipeline.run_directory import REPORT_FILE
from pipeline.runtime.signals import stopping_at_once

COMPARISON = Path("runs/comparison.html")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Output directory of a run.")
    parser.add_argument("--to", type=Path, metavar="FILE", help="The file to write.")
    options = parser.parse_args()
    with user_errors(), stopping_at_once():
        path = report(options.runs, options.to)
    print(f"Written to {path}")


def report(directories: Sequence[Path], to: Path | None) -> Path:
    """Write the report of one run, or the comparison of several; returns its path.

    Raises:
        ConfigError: a directory is not a run's, or the file cannot be written.
    """
    alone = len(directories) == 1
    path = to or (directories[0] / REPORT_FILE if alone else COMPARISON)
    page = run_page(read_run(directories[0])) if alone else comparison_page(read_runs(directories))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the report {str(path)!r} cannot be written: {error}") from error
    return path


if __name__ == "__main__":
    main()
