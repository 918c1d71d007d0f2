"""How long a step of the full recipe takes, where the time goes, and what a run of it would take.

GPT-2 of 124 M with random weights and the shapes of recipes/gpt2_imdb.yaml; a rehearsal takes the shipped model.
"""

import contextlib
import json
import statistics
import time
from collections import Counter
from pathlib import Path

import psutil
import torch

from benchmarks.gpu_checks.context import Context
from benchmarks.gpu_checks.runs import launch, more_steps, read_steps, settings_of_a_small_run, trainer_in_hand
from benchmarks.gpu_checks.speed_parts import attention, decoding, head_columns, largest_microbatch, packing
from benchmarks.gpu_checks.strategies import workers
from benchmarks.gpu_checks.timing import busy_seconds, device_work, median_seconds, profiled_events, seconds
from benchmarks.real_size import save_gpt2
from benchmarks.work import forward_flops
from pipeline.runtime.checkpoints import Checkpoints
from pipeline.trainer import PPOTrainer

__all__ = ["attention", "checkpoint", "data_parallel", "decoding", "head_columns", "largest_microbatch", "packing",
           "phases", "recipe", "start_up", "update_profile"]  # fmt: skip
RECIPE_STEPS, RECIPE_CHECKPOINTS, RECIPE_MICROBATCH = 97, 6, 16
PHASES = ("sample", "reference", "score", "forward", "update", "step")
_found: dict[str, float] = {}  # what `recipe` extrapolates from


def recipe_shapes(context: Context) -> dict[str, object]:
    """The settings of the full recipe that decide its time."""
    model = context.folder / "gpt2"
    if not context.rehearsal and not model.exists():
        save_gpt2(model)
    return {
        "model_path": context.sized(model, "assets/gpt2-imdb-mini"),
        "rollout_batch_size": context.sized(256, 8),
        "rollout_microbatch_size": context.sized(256, 8),
        "minibatch_size": context.sized(128, 4),
        "microbatch_size": context.sized(RECIPE_MICROBATCH, 2),
        "ppo_epochs": context.sized(4, 1),
        "response_min_tokens": context.sized(4, 2),
        "response_max_tokens": context.sized(16, 4),
        "learning_rate": 1e-6,
        "kl_early_stop": "null",
        "mixed_precision": "bf16",
    }


def start_up(context: Context) -> None:
    """From the start of a process until it has imported the train command and used its device."""
    torch.ones(1, device=context.device).sum().item()
    _found["start_up"] = time.time() - psutil.Process().create_time()
    if context.on_gpu("a process's start: a rehearsal has one for all checks"):
        context.measure(seconds=_found["start_up"])


def phases(context: Context) -> None:
    """Seconds of a step's phases for each size of microbatch, and the update's share of what the device multiplies."""
    with trainer_in_hand(context, **recipe_shapes(context)) as trainer:
        for size in context.sized((16, 32, 64, 128), (2, 4)):
            trainer.config.ppo.microbatch_size = size
            steps = more_steps(trainer, context.sized(4, 2))[1:]
            found = {p: statistics.median(step.get(f"time/{p}_seconds", 0.0) for step in steps) for p in PHASES}
            context.measure(**{f"seconds, microbatch {size}": found})
            _found[f"step {size}"] = found["step"]
            ratio = max(step["ppo/first_minibatch_ratio_deviation"] for step in steps)
            context.require_below("first ratio's deviation", ratio, 1e-5, where=f"microbatch {size}")
        ppo, data = trainer.config.ppo, trainer.config.data
        prompt, response = (data.prompt_min_tokens + data.prompt_max_tokens) / 2, steps[-1]["response/length_mean"]
        samples = ppo.ppo_epochs * trainer.config.rollout.rollout_batch_size
        work = 3 * samples * forward_flops(trainer.policy.model, prompt, response)
        size = context.sized(8192, 256)
        a, b = torch.randn(2, size, size, device=context.device, dtype=torch.bfloat16).unbind()
        ceiling = 2.0 * size**3 / median_seconds(context.device, lambda: a @ b, 20)
        context.measure(
            update_teraflop_per_second=work / found["update"] / 1e12,
            product_ceiling_teraflop_per_second=ceiling / 1e12,
            share_of_ceiling=work / found["update"] / ceiling,
            peak_gigabytes=steps[-1]["memory/peak_gigabytes"],
        )


def update_profile(context: Context) -> None:
    """Launches of an update, and the share of its time in which the device works."""
    with trainer_in_hand(context, **recipe_shapes(context)) as trainer:
        more_steps(trainer, 1)
        profiled: list[tuple[list, float]] = []
        update = trainer.update

        def profiling(*arguments: object) -> object:
            results: list[object] = []
            profiled.append(profiled_events(context.device, lambda: results.append(update(*arguments))))
            return results[0]

        trainer.update = profiling
        more_steps(trainer, 1)
        microbatches = _microbatches(trainer)
    (events, spent), *_ = profiled
    work = device_work(context.device, events)
    heaviest: Counter[str] = Counter()
    for name, start, end in work:
        heaviest[name[:80]] += end - start
    launches = sum("LaunchKernel" in event.name for event in events)
    context.measure(
        seconds=spent,
        launches=launches,
        launches_of_a_microbatch=launches / microbatches,
        pieces_of_work=len(work),
        busy_share=busy_seconds(work) / spent,
        heaviest=dict(heaviest.most_common(10)),
    )
    context.require("the profiler saw the device's work", len(work) > 100)
    if context.on_gpu("the count of launches"):
        context.require("the profiler saw launches", launches > 100)


def _microbatches(trainer: PPOTrainer) -> int:
    """Forwards with gradient in a step, on one worker."""
    ppo, batch = trainer.config.ppo, trainer.config.rollout.rollout_batch_size
    return ppo.ppo_epochs * (batch // ppo.minibatch_size) * -(-ppo.minibatch_size // ppo.microbatch_size)


def checkpoint(context: Context) -> None:
    """Seconds to write and to read a checkpoint."""
    directory = context.folder / "checkpoints"
    lora = context.sized({}, {"use_peft": True})  # a small one
    with trainer_in_hand(context, **recipe_shapes(context), **lora) as trainer:
        more_steps(trainer, 1)
        checkpoints = Checkpoints(trainer.accelerator, directory, keep_last=1)
        saved: list[Path] = []
        state = trainer.state()
        _found["checkpoint"] = seconds(context.device, lambda: saved.append(checkpoints.save(1, state)))
        read = seconds(context.device, lambda: checkpoints.load(saved[0]))
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    context.measure(write_seconds=_found["checkpoint"], read_seconds=read, gigabytes=size / 1e9)


def recipe(context: Context) -> None:
    """The full recipe's time, from what was measured before: an extrapolation, without its evaluation."""
    at = {name.removeprefix("step "): value for name, value in _found.items() if name.startswith("step ")}
    missing = {"start_up", "checkpoint"} - set(_found) or (set() if at else {"phases"})
    if missing:
        context.skipped = f"not measured in this process: {', '.join(sorted(missing))}"
        return
    rest = _found["start_up"] + RECIPE_CHECKPOINTS * _found["checkpoint"]
    context.measure(**{f"seconds, microbatch {size}": RECIPE_STEPS * step + rest for size, step in at.items()})
    context.on_gpu("figures that mean anything")


def data_parallel(context: Context) -> None:
    """A step's time with 1, 2, 4 and 8 GPUs, and how much of it gradients take to sum."""
    if not context.on_gpu("several GPUs' times") or not workers(context):
        return
    alone = 0.0
    for count in (n for n in (1, 2, 4, 8) if n <= workers(context)):
        directory = context.folder / f"parallel_{count}"
        settings = recipe_shapes(context) | {"microbatch_size": 128, "steps": 5, "profile": 5, "output_dir": directory}
        script = ["-m", "pipeline.train", *settings_of_a_small_run(context, **settings)]
        code, output = launch("single_gpu" if count == 1 else "multi_gpu", count, script, seconds=90)
        context.require(f"{count} GPUs: it ends well", code == 0)
        if code:
            context.measure(**{f"output, {count} GPUs": output[-1500:]})
            continue
        steps = read_steps(directory)[1:4]
        step, update = (statistics.median(s[f"time/{name}_seconds"] for s in steps) for name in ("step", "update"))
        alone = step if count == 1 else alone
        context.measure(**{
            f"{count} GPUs": {
                "step_seconds": step, "update_seconds": update, "efficiency": alone / step / count,
                "all_reduce_seconds": _all_reduce_seconds(directory / "profile" / "step_5.json"),
            }
        })  # fmt: skip


def _all_reduce_seconds(trace: Path) -> float | None:
    """Seconds of the kernels that sum gradients, in a step's trace; None where it cannot be read."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        kernels = [e for e in events if e.get("cat") == "kernel" and "nccl" in e["name"].lower()]
        return sum(e["dur"] for e in kernels if "allreduce" in e["name"].lower()) / 1e6
    return None
