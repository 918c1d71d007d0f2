"""What workers exchange in a PPO step and how long that takes, for 1, 2 and 4 CPU processes.

    python -m benchmarks.scaling                  # about three minutes of two cores

Runs recipes/quickstart.yaml for a few steps with 1, 2 and 4 processes of one thread each, and times the exchanges of
a step by themselves: gathering the rollout batch, summing the gradients. Writes
benchmarks/results/scaling.json; benchmarks/scaling.md derives from it what GPUs may expect.
"""

import json
import os
import statistics
import subprocess
import tempfile
import time
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


def _median(action, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
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
