"""Does a recipe work on every seed? Runs it once a seed, prints a table and draws a figure.

    python -m benchmarks.seeds                                      # ten seeds of recipes/quickstart.yaml
    python -m benchmarks.seeds recipes/quickstart.yaml --seeds 5 --together 2 --kl_coef 0.2

Each seed is a whole run with its evaluation in runs/seeds/<recipe>/<seed>; a seed already there is not run again.
`--together 2` runs two at a time, each in one process with half the cores; only the times differ, and rounding. All
evaluations use the same prompts and noise. Table and figure go to benchmarks/results/seeds_<recipe>.json and .png.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.runs import ROOT, Run, cells, complete, row, table
from pipeline.frontiers import Frontier, load_frontier
from pipeline.plane import draw_frontier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("--seeds", type=int, default=10, help="Seeds 0 to this, exclusive.")
    parser.add_argument("--together", type=int, default=1, help="Runs at a time.")
    options, settings = parser.parse_known_args()
    recipe = Path(options.recipe)
    place = ROOT / "runs/seeds" / recipe.stem
    runs = [Run(place / str(seed), ["--seed", str(seed), *settings]) for seed in range(options.seeds)]
    complete(recipe, runs, together=options.together)
    rows = [{"seed": seed, **row(run.directory)} for seed, run in enumerate(runs)]
    print(table("seed", [(str(r["seed"]), cells(r)) for r in rows]))
    print(summary(rows))
    file = ROOT / f"benchmarks/results/seeds_{recipe.stem}.json"
    file.write_text(json.dumps({"recipe": str(recipe), "settings": settings, "rows": rows}, indent=1) + "\n")
    shipped = ROOT / f"assets/frontiers/{recipe.stem}.json"
    draw(file.with_suffix(".png"), rows, load_frontier(shipped) if shipped.is_file() else None)


def summary(rows: list[dict[str, object]]) -> str:
    """How far the seeds lie apart, and how many did not finish."""
    finished = np.array([r["after"] for r in rows if "after" in r])
    guarded = len(rows) - len(finished)
    if not len(finished):
        return f"all {guarded} seeds ended by a guard"
    farthest = np.abs(finished - finished.mean()).max()
    return (
        f"{len(rows)} seeds: P(POSITIVE) {finished.mean():.3f} in the mean, the farthest seed {farthest:.3f} from it; "
        f"{guarded} ended by a guard"
    )


def draw(path: Path, rows: list[dict[str, object]], frontier: Frontier | None) -> None:
    """Each seed's result with its interval, and each seed's way over the plane of KL and reward."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if "after" in r]
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    seeds, after = [r["seed"] for r in rows], np.array([r["after"] for r in rows])
    low, high = np.array([r["ci95"] for r in rows]).T
    left.axhspan(after.mean() - 0.05, after.mean() + 0.05, color="tab:green", alpha=0.15, label="mean ± 0.05")
    left.errorbar(seeds, after, yerr=[after - low, high - after], fmt="o", capsize=3, label="tuned, 95 % interval")
    left.plot(seeds, [r["before"] for r in rows], "o", color="tab:gray", label="original")
    left.set(xlabel="seed", ylabel="P(POSITIVE), held-out prompts", xticks=seeds, ylim=(0, 1))
    left.legend(loc="lower right")
    if frontier is not None:
        draw_frontier(right, frontier)
    for r in rows:
        right.plot([p["kl"] for p in r["way"]], [p["reward"] for p in r["way"]], linewidth=0.8, color="tab:orange")
    right.plot([r["kl"] for r in rows], after, "o", color="tab:red", label="tuned")
    right.set(xlabel="KL from the original, nats a response", ylabel="P(POSITIVE)")
    right.grid(alpha=0.3)
    right.legend(loc="lower right")
    figure.savefig(path)


if __name__ == "__main__":
    main()
