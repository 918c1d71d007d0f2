"""Does the full recipe fit this machine? Three PPO steps of a 124 M GPT-2 with the shapes of recipes/gpt2_imdb.yaml.

    python -m benchmarks.full_size                       # full fine-tuning
    python -m benchmarks.full_size recipes/gpt2_imdb_lora.yaml --mixed_precision no

One process. The weights are random (memory and time do not depend on them), the reward model is the shipped one, and
prompts are cut with the shipped tokenizer. Prints seconds a step and the peak memory of the process, and writes them to
benchmarks/results/full_size_<recipe>.json with the hardware.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

from benchmarks.real_size import PARAMETERS, ROOT, save_gpt2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("recipes/gpt2_imdb.yaml"))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="Of launch.sh or the run.")
    arguments = parser.parse_args()
    recipe, options = arguments.recipe, arguments.options
    with tempfile.TemporaryDirectory() as folder:
        model, run = save_gpt2(Path(folder) / "gpt2"), Path(folder) / "run"
        command = ["./launch.sh", str(recipe), "--config", "single_gpu", "--steps", "3", "--evaluation_prompts", "0"]
        command += ["--save_every_steps", "0"]
        command += ["--model_path", str(model), "--output_dir", str(run), "--dataset", "movie-reviews"]
        command += ["--reward_model_path", "assets/distilbert-imdb-mini", *options]
        subprocess.run(command, cwd=ROOT, check=True)
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = {
        "recipe": str(recipe),
        "options": options,
        "parameters": PARAMETERS,
        "steps": len(steps),
        "seconds_per_step": [round(step["time/step_seconds"], 1) for step in steps],
        "peak_gigabytes": round(steps[-1]["memory/peak_gigabytes"], 2),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    name = f"full_size_{recipe.stem}.json"
    (ROOT / "benchmarks/results" / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
