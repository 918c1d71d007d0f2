"""Each strategy of several GPUs: it ends, it computes what one GPU does, it resumes and saves."""

import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.gpu_checks.context import Context
from benchmarks.gpu_checks.runs import launch, read_steps, settings_of_a_small_run, train_here
from benchmarks.kill_and_resume import UNTIMED
from pipeline.runtime.checkpoints import trained_weights

STEPS = 2
ENDED_WITHIN = 15.0  # seconds after one worker crashed
TRAINING_SECONDS = 45  # longer is a hang
ONE_GPUS = 1e-3  # how far figures of the first step may be from one GPU's
CRASH = "crash"
LORA = {"use_peft": True, "mixed_precision": "bf16"}


def multi_gpu(context: Context) -> None:
    _check(context, "multi_gpu")


def zero1(context: Context) -> None:
    _check(context, "zero1")


def zero2(context: Context) -> None:
    _check(context, "zero2")


def zero3(context: Context) -> None:
    _check(context, "zero3")


def zero3_offload(context: Context) -> None:
    _check(context, "zero3_offload")


def fsdp2(context: Context) -> None:
    _check(context, "fsdp2")


def workers(context: Context) -> int:
    """How many to start: the largest power of two that there are GPUs for, up to 8; 0 where one GPU is all."""
    count = 2 if context.rehearsal else torch.cuda.device_count()
    if count < 2:
        context.skipped = f"needs several GPUs, and there is {count}"
        return 0
    return min(8, 2 ** (count.bit_length() - 1))


def _part(context: Context) -> int:
    """Sequences per forward of a rollout, for any number of workers: another shape rounds, and so draws, otherwise."""
    return context.sized(16, 2)


def _check(context: Context, config: str) -> None:
    if config != "multi_gpu" and not context.on_gpu(f"{config}: it differs from multi_gpu in its configuration alone"):
        return
    if not workers(context):
        return
    alone = context.folder / "alone"
    if not alone.exists():
        train_here(context, "alone", steps=STEPS, rollout_microbatch_size=_part(context))
    trainings = {"no": {}, "no_resumed": {}, "bf16": {"mixed_precision": "bf16"}, "bf16_resumed": {}, "lora": LORA}
    if context.rehearsal:
        trainings = {name: trainings[name] for name in ("no", "no_resumed")}
    directory, last = context.folder / config, {CRASH: {}} if config == "multi_gpu" else {}
    if not _launch(context, config, directory, trainings | last):
        return
    _compare(context, "no, beside one GPU", alone, directory / "no", slice(0, 1), ONE_GPUS)
    for name in trainings:
        of = name.removesuffix("_resumed")
        _look_at(context, name, directory / name, lora=trainings[of] is LORA)
        if not config.startswith("zero"):  # DeepSpeed's optimizer holds flat parts of them
            seen = json.loads((directory / name / "seen_0.json").read_text())
            whole = len(seen["trainable"]) == seen["optimized"]
            context.require(f"{name}: the optimizer has every trainable weight", whole)
        if of != name:
            _compare(context, f"{name}, beside the whole run", directory / of, directory / name, slice(0, STEPS), 1e-4)


def _launch(context: Context, config: str, directory: Path, trainings: dict[str, dict]) -> bool:
    """Run the trainings, with a checkpoint after each step; one named …_resumed goes on from the other's first step.

    In one named `CRASH`, which is the last, a worker crashes. Gives whether all others ended well.
    """
    directory.mkdir()
    plan = []
    for name, changed in trainings.items():
        of = name.removesuffix("_resumed")
        settings = {
            "steps": STEPS,
            "save_every_steps": 1,
            "keep_last": STEPS + 1,
            "evaluation_prompts": 16,
            "quiet": True,
            "rollout_microbatch_size": _part(context),
        }
        settings |= trainings[of] | changed | {"output_dir": directory / name / "run"}
        if of != name:
            settings["resume"] = directory / of / "run" / "checkpoints" / "step_000001"
        plan.append({"name": name, "settings": settings_of_a_small_run(context, **settings), "crashes": name == CRASH})
    seconds = context.sized(TRAINING_SECONDS, 150)
    (directory / "plan.json").write_text(json.dumps({"seconds": seconds, "trainings": plan}))
    script = ["-m", "benchmarks.gpu_checks.strategy_run", str(directory), str(directory / "plan.json")]
    code, output = launch(
        context.sized(config, "cpu"), workers(context), script, seconds=seconds * (1 + len(plan)), NCCL_DEBUG="WARN"
    )
    (directory / "ended.json").write_text(json.dumps([time.time(), output]))
    crashes = CRASH in trainings
    codes = [path.read_text() for path in sorted(directory.glob("*/code_*"))]
    well = (code == 0) is not crashes and codes == ["0"] * (len(plan) - crashes) * workers(context)
    if not well:
        context.measure(output=output[-2500:])
    context.require("all trainings of all workers end well", well)
    return well


def _look_at(context: Context, name: str, folder: Path, *, lora: bool) -> None:
    """What each worker saw of a training, and what it saved."""
    seen = [json.loads(path.read_text()) for path in sorted(folder.glob("seen_*.json"))]
    run, one = folder / "run", seen[0]
    steps = sum(step["ppo/optimizer_steps"] for step in read_steps(run))
    context.measure(**{f"{name}, worker 0": one | {"trainable": len(one["trainable"])}})
    context.require(f"{name}: every worker has a device of its own", _devices_differ(context, seen))
    context.require(f"{name}: GPT-2's head is its embedding", all(w["tied"] for w in seen))
    context.require(f"{name}: Adam has counted {steps:g} steps", all(w["adam_steps"] == [steps] for w in seen))
    context.require(
        f"{name}: the engine's outputs are float32", all(w["output_types"] == ["torch.float32"] for w in seen)
    )
    context.require(f"{name}: one text has one score on all workers", all(w["scores"] == one["scores"] for w in seen))
    last = trained_weights(run / "checkpoints" / f"step_{STEPS:06}")
    saved = load_file(run / ("adapter_model.safetensors" if lora else "model.safetensors"))
    names = {f"model.{n.replace('.weight', '.default.weight')}" if lora else f"model.{n}": n for n in saved}
    same = all(torch.equal(last[n].cpu(), saved[m]) for n, m in names.items() if n in last)
    context.require(f"{name}: the saved weights are the last checkpoint's", same and set(names) <= set(last))
    begun = run / "checkpoints" / "step_000000"
    if begun.exists():  # not where it was resumed
        first = trained_weights(begun)
        still = [n for n in one["trainable"] if torch.equal(first[n], last[n])]
        context.require(f"{name}: every trainable weight has moved ({still[:3]} have not)", not still)
    context.require(f"{name}: it was evaluated", (run / "evaluation.json").is_file())


def _devices_differ(context: Context, seen: list[dict]) -> bool:
    return len(seen) == workers(context) and (context.rehearsal or len({w["device"] for w in seen}) == len(seen))


def _compare(context: Context, what: str, expected: Path, found: Path, rows: slice, limit: float) -> None:
    """Require that the figures of some steps are alike."""
    runs = [path / "run" if (path / "run").exists() else path for path in (expected, found)]
    largest, where = 0.0, ""
    for one, two in zip(*(read_steps(run)[rows] for run in runs), strict=True):
        for name, value in one.items():
            if not name.startswith(UNTIMED):
                off = abs(two[name] - value) / max(1.0, abs(value))
                if not off <= largest:
                    largest, where = off, name
    context.measure(**{f"furthest, {what}": where})
    context.require_below("difference", largest, limit, where=what)


def shard_reference(context: Context) -> None:
    """A reference that is sharded as well, under ZeRO-3."""
    if not context.on_gpu("shard_reference: DeepSpeed's sharding on GPUs") or not workers(context):
        return
    alone, directory = context.folder / "alone", context.folder / "shard_reference"
    if not alone.exists():
        train_here(context, "alone", steps=STEPS, rollout_microbatch_size=_part(context))
    if _launch(context, "zero3", directory, {"no": {"shard_reference": True}}):
        _compare(context, "beside one GPU", alone, directory / "no", slice(0, 1), ONE_GPUS)


def crash_of_one_worker(context: Context) -> None:
    """A worker that crashes ends them all, soon and by name."""
    if not workers(context):
        return
    directory = context.folder / "multi_gpu"
    if not directory.exists():  # where multi_gpu was run, its last training crashed
        _launch(context, "multi_gpu", directory, {CRASH: {}})
    ended, output = json.loads((directory / "ended.json").read_text())
    crashed_at = directory / CRASH / "crashed_at"
    context.require("it crashed", crashed_at.is_file())
    if crashed_at.is_file():
        seconds = ended - float(crashed_at.read_text())
        context.require_below("seconds until all had ended", seconds, context.sized(ENDED_WITHIN, 60.0))
    context.require("it names the worker and why", "worker 1 of" in output and "ZeroDivisionError" in output)
