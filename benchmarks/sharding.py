"""What ZeRO-3 costs a rollout and what LoRA saves in memory, on a GPT-2 of 124 M.

    python -m benchmarks.sharding                        # CPU: three minutes of two cores
    python -m benchmarks.sharding --processes 8          # on GPUs, one process each

Runs recipes/gpt2_imdb.yaml for a few small steps: data parallel and ZeRO-3 in turn for the rollout's seconds (sampling
and the forwards of policy and reference), then full and LoRA in one process for the peak of memory. Prints the ratios
and writes benchmarks/results/sharding.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch

from benchmarks.real_size import PARAMETERS, ROOT, save_gpt2

SMALL = ["--dataset", "movie-reviews", "--reward_model_path", "assets/distilbert-imdb-mini",
         "--evaluation_prompts", "0", "--save_every_steps", "0", "--ppo_epochs", "1",
         "--rollout_batch_size", "32", "--minibatch_size", "32",
         "--rollout_microbatch_size", "16", "--microbatch_size", "4"]  # fmt: skip

PHASES = ("sample", "reference", "forward")


def run(model: Path, directory: Path, *options: str) -> list[dict[str, float]]:
    """Train a few steps; the figures of each."""
    command = ["./launch.sh", "recipes/gpt2_imdb.yaml", "--model_path", str(model), "--output_dir", str(directory)]
    subprocess.run([*command, *SMALL, *options], cwd=ROOT, check=True)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def rollout_seconds(steps: list[dict[str, float]]) -> float:
    """Median of the steps after the first, which warms up."""
    return statistics.median(sum(step.get(f"time/{p}_seconds", 0.0) for p in PHASES) for step in steps[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    replicated = "multi_gpu" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        model = save_gpt2(Path(folder) / "gpt2")
        shared = ["--num_processes", str(arguments.processes), "--steps", str(arguments.steps)]
        seconds = {
            config: rollout_seconds(run(model, Path(folder) / config, "--config", config, *shared))
            for config in (replicated, "zero3")
        }
        memory = {}
        for name, options in (("full", []), ("lora", ["--use_peft", "true"])):
            steps = run(model, Path(folder) / name, "--config", "single_gpu", "--steps", "2", *options)
            memory[name] = steps[-1]["memory/peak_gigabytes"]
    reference, moments = PARAMETERS * 4 / 1e9, PARAMETERS * 8 / 1e9
    result = {
        "rollout_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "zero3_over_replicated": round(seconds["zero3"] / seconds[replicated], 2),
        "peak_gigabytes": {name: round(value, 2) for name, value in memory.items()},
        "lora_saves_gigabytes": round(memory["full"] - memory["lora"], 2),
        "reference_copy_and_adam_moments_gigabytes": round(reference + moments, 2),
        "processes": arguments.processes,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    path = ROOT / "benchmarks/results/sharding.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
