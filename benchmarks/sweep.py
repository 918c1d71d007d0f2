"""What each switch of the algorithm does: a recipe with one setting changed at a time, on the same seeds.

    python -m benchmarks.sweep benchmarks/sweeps/quickstart.yaml --together 2

A sweep file names the recipe, the seeds and the variants, each a few settings over the recipe. Each run is whole, with
its evaluation, in runs/sweeps/<sweep>/<variant>/<seed>; what is there is not run again, so a sweep that was cut off
goes on. The table, means over the seeds, goes to benchmarks/results/sweep_<sweep>.json and .md.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import yaml

from benchmarks.runs import ROOT, Run, cells, complete, row, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--together", type=int, default=1, help="Runs at a time.")
    options = parser.parse_args()
    sweep = yaml.safe_load(options.sweep.read_text())
    recipe, seeds = Path(sweep["recipe"]), sweep["seeds"]
    place = ROOT / "runs/sweeps" / options.sweep.stem
    variants = {
        name: [
            Run(place / name.replace(" ", "_") / str(seed), ["--seed", str(seed), *(settings or "").split()])
            for seed in seeds
        ]
        for name, settings in sweep["variants"].items()
    }
    complete(recipe, [run for seed in zip(*variants.values(), strict=True) for run in seed], together=options.together)
    rows = {name: [row(run.directory) for run in runs] for name, runs in variants.items()}
    text = table("variant", [(name, cells(mean(figures))) for name, figures in rows.items()])
    print(text)
    file = ROOT / f"benchmarks/results/sweep_{options.sweep.stem}.json"
    file.write_text(json.dumps({"sweep": sweep, "rows": rows}, indent=1) + "\n")
    file.with_suffix(".md").write_text(text + "\n")


def mean(rows: list[dict[str, object]]) -> dict[str, object]:
    """Means over seeds, intervals too (each is over prompts); of a variant that a guard ended, that."""
    ended = [r for r in rows if "ended_by_guard" in r]
    if ended:
        return ended[0]

    def middle(name: str) -> object:
        values = [r[name] for r in rows]
        return None if None in values else np.mean(values, 0).tolist()

    return {name: middle(name) for name in rows[0] if name != "way"}


if __name__ == "__main__":
    main()
