"""Whole runs of a recipe, several at a time, and what their evaluations say: for `seeds` and `sweep`."""

import json
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import GUARD_STOPPED

ROOT = Path(__file__).resolve().parents[1]
ENDED_BY_GUARD = "ended_by_guard"  # an empty file in the directory of such a run


@dataclass(frozen=True)
class Run:
    """One run: where it is kept and the settings over the recipe's."""

    directory: Path
    settings: Sequence[str]


def complete(recipe: Path, runs: Sequence[Run], *, together: int) -> None:
    """Run those that are not finished yet, `together` at a time, each then in one process with its share of the cores.

    A guard that ends a run is a result too; anything else that does not end well is an error.
    """

    def one(run: Run) -> None:
        if any((run.directory / name).is_file() for name in ("evaluation.json", ENDED_BY_GUARD)):
            return
        command = ["./launch.sh", str(recipe), "--output_dir", str(run.directory), *run.settings]
        environment = dict(os.environ)
        if together > 1:
            command += ["--config", "single_gpu"]
            environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // together))
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        if done.returncode == GUARD_STOPPED:
            (run.directory / ENDED_BY_GUARD).touch()
        elif done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")

    with ThreadPoolExecutor(together) as pool:
        list(pool.map(one, runs))


def row(directory: Path) -> dict[str, object]:
    """The figures of a finished run that tables are made of."""
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    if (directory / ENDED_BY_GUARD).is_file():
        return {"ended_by_guard": len(steps)}
    figures = json.loads((directory / "evaluation.json").read_text())
    before, after = figures["before"], figures["after"]
    frontier = figures.get("frontier", {})
    return {
        "before": before["probability"]["mean"],
        "after": after["probability"]["mean"],
        "ci95": after["probability"]["ci95"],
        "logit": after["logit"]["mean"],
        "kl": figures["kl"],
        "beyond_frontier": "beyond" in frontier,
        "kl_needed": frontier.get("kl_needed"),
        "kl_overspend": frontier.get("kl_overspend"),
        "kl_overspend_ci95": frontier.get("kl_overspend_ci95"),
        "distinct_2_ratio": after["distinct_2"] / before["distinct_2"],
        "repeated_3": after["repeated_3"],
        "perplexity": after["perplexity"],
        "training_seconds": sum(step["time/step_seconds"] for step in steps),
        "peak_gigabytes": steps[-1]["memory/peak_gigabytes"],
        "way": figures["way"],
    }


def cells(figures: dict[str, object]) -> list[str]:
    """P(POSITIVE) with its interval, KL, overspend with its interval, distinct-2: the cells `HEADER` names."""
    if "ended_by_guard" in figures:
        return [f"ended by a guard after step {figures['ended_by_guard']}", "", "", ""]
    low, high = figures["ci95"]
    spent = "beyond what is known" if figures["beyond_frontier"] else "unknown"
    if figures["kl_overspend"] is not None:
        spent = "{:.2f} ({:.2f} to {:.2f})".format(figures["kl_overspend"], *figures["kl_overspend_ci95"])
    return [
        f"{figures['after']:.3f} ({low:.3f} to {high:.3f})",
        f"{figures['kl']:.2f}",
        spent,
        f"{figures['distinct_2_ratio']:.2f}",
    ]


HEADER = ["P(POSITIVE) after (95 % interval)", "KL, nats", "KL overspend (95 % interval)", "distinct-2 after / before"]


def table(first: str, rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A Markdown table; `first` heads the first column."""
    lines = [[first, *HEADER], ["---", *["---:"] * len(HEADER)], *([name, *rest] for name, rest in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
