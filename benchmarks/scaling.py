"""What workers exchange in a PPO step and how long that takes, for 1, 2 and 4 CPU processes.

    python -m benchmarks.scaling                  # about three minutes of two cores
    python -m benchmarks.scaling --expect         # no measurement: the table of benchmarks/scaling.md

Runs recipes/quickstart.yaml for a few steps with 1, 2 and 4 processes of one thread each, and times the exchanges of
a step by themselves: gathering the rollout batch, summing the gradients. Writes
benchmarks/results/scaling.json; benchmarks/scaling.md derives from it what GPUs may expect.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.work import ROOT, save_result

PROCESSES = (1, 2, 4)
PARAMETERS = {"6.9 M": 6_900_000, "124 M": 124_439_808}
ROLLOUT_BYTES = 256 * 24 * (8 + 1 + 4 * 4) + 256 * 8 * 9  # tokens, mask, four figures a response token; prompts


def exchanges(rank: int, world: int, port: int, folder: str) -> None:
    """Seconds of one gathering of the rollout and of one sum of each model's gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    times = {}
    share = torch.zeros(ROLLOUT_BYTES // 4 // world)
    times["rollout"] = _median(lambda: dist.all_gather([torch.empty_like(share) for _ in range(world)], share), 20)
    for name, count in PARAMETERS.items():
        gradients = torch.zeros(count)
        times[name] = _median(lambda gradients=gradients: dist.all_reduce(gradients), 5)
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


def _median(action: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


@dataclass(frozen=True)
class Model:
    """Sizes of a GPT-2."""

    name: str
    layers: int
    width: int
    vocabulary: int = 50257

    @property
    def trunk(self) -> float:
        return 12.0 * self.layers * self.width**2

    @property
    def head(self) -> float:
        return float(self.vocabulary * self.width)

    @property
    def parameters(self) -> float:
        return self.trunk + self.head


MODELS = (Model("124 M", 12, 768), Model("1.5 B", 48, 1600))
PROMPT, RESPONSE, EPOCHS, ROLLOUTS, MINIBATCH = 8, 24, 4, 512, 128
# Assumed of an H100 in bf16; none of it measured here.
PRODUCTS, MEMORY, NVLINK, NETWORK = 790e12 * 0.3, 3.35e12 * 0.5, 300e9, 40e9  # FLOP/s, bytes/s; the last two a GPU


def gradient_bytes(model: Model, strategy: str) -> float:
    """What a worker sends in an optimiser step of one microbatch, in the limit of many workers; everything float32.

    Data parallelism's all-reduce is a reduce-scatter and an all-gather; ZeRO-1 and -2 scatter gradients and gather new
    weights instead, which is as much. ZeRO-3 gathers the weights for the forward and again for the backward.
    """
    return 4.0 * model.parameters * (3 if strategy == "zero3" else 2)


def expected_seconds(
    model: Model, strategy: str, workers: int, bandwidth: float, rollouts: int, minibatch: int
) -> dict:
    """Seconds of a PPO step's parts on each of `workers` GPUs, nothing overlapped; sizes are global."""
    forward = 2.0 * model.trunk * (PROMPT + RESPONSE) + 2.0 * model.head * RESPONSE
    mine = rollouts / workers
    cache = 2 * 2 * model.layers * model.width * (PROMPT + RESPONSE / 2) * mine
    decode = RESPONSE * (2 * model.parameters + cache) / MEMORY
    part = (workers - 1) / workers
    optimizer_steps = EPOCHS * rollouts // minibatch
    return {
        "decode": decode,
        "products": (2 + 3 * EPOCHS) * forward * mine / PRODUCTS,  # reference, reading in bf16, epochs
        "gradients": optimizer_steps * part * gradient_bytes(model, strategy) / bandwidth,
        "weights": part * 4 * model.parameters / bandwidth if strategy == "zero3" else 0.0,
        "rollout": part * rollouts * RESPONSE * (8 + 1 + 4 * 4) / bandwidth,
    }


def print_expectations() -> None:
    """Efficiency: one GPU's time for the work over all GPUs' time together."""
    print("| model | workers | sizes | strategy | step, ms | of it gradients, ms | rollout gather, ms | efficiency |")
    print("|---|---|---|---|---:|---:|---:|---:|")
    for model in MODELS:
        for where, workers, bandwidth in (("8 GPUs, NVLink", 8, NVLINK), ("8 nodes x 8", 64, NETWORK)):
            for sizes, factor in (("fixed", 1), ("a worker", workers)):
                work = (ROLLOUTS * factor, MINIBATCH * factor)
                alone = sum(expected_seconds(model, "ddp", 1, bandwidth, *work).values())
                for names, strategy in (("ddp, zero1, zero2", "ddp"), ("zero3", "zero3")):
                    parts = expected_seconds(model, strategy, workers, bandwidth, *work)
                    step = sum(parts.values())
                    print(
                        f"| {model.name} | {where} | {sizes} | {names} | {1e3 * step:.0f} "
                        f"| {1e3 * parts['gradients']:.0f} | {1e3 * parts['rollout']:.3f} "
                        f"| {alone / workers / step:.0%} |"
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--expect", action="store_true", help="Measure nothing; print what GPUs may expect.")
    if parser.parse_args().expect:
        print_expectations()
        return
    result = {"rollout_bytes": ROLLOUT_BYTES, "cores": os.cpu_count(), "torch": torch.__version__, "processes": {}}
    with tempfile.TemporaryDirectory() as folder:
        for world in PROCESSES:
            run = Path(folder) / str(world)
            subprocess.run(
                ["./launch.sh", "recipes/quickstart.yaml", "--num_processes", str(world), "--steps", "5",
                 "--evaluation_prompts", "0", "--save_every_steps", "0", "--output_dir", str(run)],
                cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
            names = [name for name in steps[0] if name.startswith("time/")]
            seconds = {n.split("/")[1]: round(statistics.median(s[n] for s in steps), 3) for n in names}
            mp.spawn(exchanges, (world, 29400 + world, folder), nprocs=world)
            times = json.loads(Path(folder, "times.json").read_text())
            result["processes"][world] = {
                **seconds,
                "optimizer_steps": steps[0]["ppo/optimizer_steps"],
                "exchange_seconds": {name: round(value, 5) for name, value in times.items()},
            }
    print(json.dumps(result, indent=2))
    save_result("scaling", result)


if __name__ == "__main__":
    main()
