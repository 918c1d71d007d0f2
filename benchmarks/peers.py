"""The same PPO work by TRL's two trainers and by this project, in turn, in one run; prints ratios and their spread.

    python -m benchmarks.peers                               # float32: about 15 minutes of two cores, after pip
    python -m benchmarks.peers --precision bf16 --only trl_1_12

The peers are TRL 1.12.0's `experimental.ppo.PPOTrainer`, the last one TRL had, and TRL 0.7.10's `PPOTrainer`, each in
an environment of its own that this makes with pip under runs/peers. All do whole steps with a GPT-2 of 124 M random
weights: sample, score (at no cost), reference, epochs of minibatches; the same threads and precision. What differs:

- TRL 1.12.0 trains a value model with a trunk of its own; 0.7.10 and this project have a value head on the policy's.
- Both compute log-probs of the responses before the update in a forward of their own; in float32 this project has them
  from sampling.
- TRL 0.7.10 runs its bf16 under Accelerate's autocast but generates outside of it, as its users get it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.work import MALLOC, ROOT, save_result, spread

PINS = {
    "trl_1_12": [["torch==2.13.0", "trl==1.12.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0"]],
    "trl_0_7_10": [
        ["torch==2.13.0", "trl==0.7.10", "transformers==4.37.2", "datasets==2.16.1", "peft==0.10.0",
         "accelerate==0.27.2", "numpy<2", "pyarrow<18", "pandas==2.2.2"],
        ["setuptools<70"],  # against torch's own wish, which pip would not go against in one go
    ],
}  # fmt: skip
ENVIRONMENT = {**os.environ, **MALLOC, "HF_HUB_OFFLINE": "1"}  # the same for all


def environment(name: str) -> Path:
    """The peer's interpreter, in a virtual environment made when missing."""
    folder = ROOT / "runs/peers" / name
    ready = folder / ".ready"
    if not ready.exists():
        print(f"making {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for pins in PINS[name]:
            subprocess.run([folder / "bin/pip", "install", "--quiet", *pins], check=True)
        ready.touch()
    return folder / "bin/python"


def run_peer(name: str, work: dict[str, object]) -> dict[str, object]:
    """Seconds of each step after the first, and peak memory, of a peer."""
    script = ROOT / "benchmarks/peer_scripts" / f"{name}.py"
    command = [environment(name), script, json.dumps(work)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=ENVIRONMENT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def run_ours(work: dict[str, object]) -> dict[str, object]:
    """The same of this project, by `benchmarks.ppo`."""
    names = ("batch", "minibatch", "prompt", "response", "epochs", "steps", "threads", "precision")
    options = [text for name in names for text in (f"--{name}", str(work[name]))]
    command = [sys.executable, "-m", "benchmarks.ppo", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    result = json.loads(done.stdout[done.stdout.index('{\n  "settings"') :])
    return {"seconds": result["step_seconds"], "peak_gigabytes": result["peak_gigabytes"], "detail": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("batch", 32), ("minibatch", 16), ("prompt", 8), ("response", 24), ("epochs", 4), ("steps", 1),
                        ("rounds", 3), ("threads", os.cpu_count())):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--only", nargs="+", default=list(PINS), choices=list(PINS))
    arguments = parser.parse_args()
    work = vars(arguments)
    for name in arguments.only:
        environment(name)
    names = [*arguments.only, "ours"]
    rounds: dict[str, list[dict[str, object]]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name in names:
            rounds[name].append(run_ours(work) if name == "ours" else run_peer(name, work))
            seconds = ", ".join(f"{s:.1f}" for s in rounds[name][-1]["seconds"])
            print(f"round {number + 1}: {name}: {seconds} s a step", flush=True)
    per_round = {name: [statistics.median(r["seconds"]) for r in runs] for name, runs in rounds.items()}
    memory = {name: max(r["peak_gigabytes"] for r in runs) for name, runs in rounds.items()}
    result = {
        "work": {k: v for k, v in work.items() if k != "only"},
        "samples_per_second": {n: spread([arguments.batch / s for s in v]) for n, v in per_round.items()},
        "times_as_fast_as": {
            name: spread([peer / ours for peer, ours in zip(per_round[name], per_round["ours"], strict=True)])
            for name in arguments.only
        },
        "peak_gigabytes": memory,
        "memory_share_of": {name: memory["ours"] / memory[name] for name in arguments.only},
        "share_of_product_ceiling": spread([r["detail"]["share_of_ceiling"] for r in rounds["ours"]]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    save_result(f"peers_{'float32' if arguments.precision == 'no' else 'bf16'}", result)


if __name__ == "__main__":
    main()
