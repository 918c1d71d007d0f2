"""Does a recipe work on every seed? Runs it once a seed and prints a table.

    python -m benchmarks.seeds                                      # five seeds of recipes/quickstart.yaml
    python -m benchmarks.seeds recipes/quickstart.yaml --seeds 10 --together 2 --kl_coef 0.2

Each seed is a whole run with its evaluation in runs/seeds/<recipe>/<seed>; a seed already there is not run again.
`--together 2` runs two at a time, each in one process with half the cores; only the times differ, and rounding. All
evaluations use the same prompts and noise. The table goes to benchmarks/results/seeds_<recipe>.json.
"""

import argparse
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("--seeds", type=int, default=5, help="Seeds 0 to this, exclusive.")
    parser.add_argument("--together", type=int, default=1, help="Runs at a time.")
    options, settings = parser.parse_known_args()
    recipe = Path(options.recipe)

    def one(seed: int) -> dict[str, object]:
        run = ROOT / "runs/seeds" / recipe.stem / str(seed)
        if not (run / "evaluation.json").is_file():
            command = ["./launch.sh", str(recipe), "--seed", str(seed), "--output_dir", str(run), *settings]
            environment = dict(os.environ)
            if options.together > 1:
                command += ["--config", "single_gpu"]
                environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // options.together))
            subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        return row(seed, run)

    with ThreadPoolExecutor(options.together) as pool:
        rows = list(pool.map(one, range(options.seeds)))
    print("| seed | P(POSITIVE) before | after (95 % interval) | logit after | KL, nats | distinct-2 after / before |")
    print("|---:|---:|---:|---:|---:|---:|")
    for r in rows:
        low, high = r["ci95"]
        print(f"| {r['seed']} | {r['before']:.3f} | {r['after']:.3f} ({low:.3f} to {high:.3f}) | {r['logit']:.2f} "
              f"| {r['kl']:.2f} | {r['distinct_2_ratio']:.2f} |")  # fmt: skip
    file = ROOT / f"benchmarks/results/seeds_{recipe.stem}.json"
    file.write_text(json.dumps({"recipe": str(recipe), "settings": settings, "rows": rows}, indent=2) + "\n")


def row(seed: int, run: Path) -> dict[str, object]:
    """What the table says of a finished run."""
    figures = json.loads((run / "evaluation.json").read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = figures["before"], figures["after"]
    return {
        "seed": seed,
        "before": before["probability"]["mean"],
        "after": after["probability"]["mean"],
        "ci95": after["probability"]["ci95"],
        "logit": after["logit"]["mean"],
        "kl": figures["kl"],
        "distinct_2_ratio": after["distinct_2"] / before["distinct_2"],
        "perplexity": after["perplexity"],
        "training_seconds": sum(step["time/step_seconds"] for step in steps),
        "peak_gigabytes": steps[-1]["memory/peak_gigabytes"],
    }


if __name__ == "__main__":
    main()
