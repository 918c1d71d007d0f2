"""Short trainings of the shipped models by the train command, in each precision, of all weights and of adapters."""

import json
import math
import threading
import time

import torch

from benchmarks.gpu_checks.context import Context
from benchmarks.gpu_checks.runs import Run, train_here
from benchmarks.gpu_checks.timing import busy_seconds

# Largest |ratio - 1| before any update, by precision. In bf16 the logits are the same and the normalizer is rounded in
# float32; a compiled forward rounds otherwise than the one without gradient.
DEVIATION = {"no": 1e-4, "bf16": 1e-5, "fp16": 1e-3}
DEVIATION_COMPILED = 0.1
REWARD_SECONDS = 0.3
_in_main_thread: list[bool] = []


def full_no(context: Context) -> None:
    _train(context, "no")


def full_bf16(context: Context) -> None:
    _train(context, "bf16")


def full_fp16(context: Context) -> None:
    _train_in_float16(context)


def lora_no(context: Context) -> None:
    _train(context, "no", use_peft=True)


def lora_bf16(context: Context) -> None:
    _train(context, "bf16", use_peft=True)


def lora_fp16(context: Context) -> None:
    _train_in_float16(context, use_peft=True)


def gradient_checkpointing(context: Context) -> None:
    _train(context, "bf16", gradient_checkpointing=True)


def torch_compile(context: Context) -> None:
    """Blocks compiled for the update; a rehearsal runs them as they are, since compiling takes a CPU half a minute."""
    compiling = context.on_gpu("the compilation of the blocks")
    if not compiling:
        torch.compiler.set_stance("force_eager")
    try:
        _train(context, "bf16", limit=DEVIATION_COMPILED, torch_compile=True)
    finally:
        if not compiling:
            torch.compiler.set_stance("default")


def _train_in_float16(context: Context, **settings: object) -> None:
    if context.on_gpu("float16: Accelerate scales its gradients on GPUs only"):
        _train(context, "fp16", **settings)


def _train(context: Context, precision: str, *, limit: float | None = None, **settings: object) -> Run:
    """Train and look at what every run must show."""
    name = "_".join([precision, *(name for name, value in settings.items() if value is True)])
    run = train_here(context, name, mixed_precision=precision, **settings)
    deviation = max(step["ppo/first_minibatch_ratio_deviation"] for step in run.steps)
    context.measure(
        seconds_of_steps=[step["time/step_seconds"] for step in run.steps],
        peak_gigabytes=run.steps[-1]["memory/peak_gigabytes"],
        gradient_norm=[step["ppo/gradient_norm"] for step in run.steps],
    )
    context.require("it took its steps", len(run.steps) == context.sized(3, 2))
    context.require_below("first ratio's deviation", deviation, DEVIATION[precision] if limit is None else limit)
    finite = all(isinstance(v, int | float) and math.isfinite(v) for step in run.steps for v in step.values())
    context.require("all figures are finite", finite)
    context.require(f"its output names {context.device}", f"1 worker on {context.device} " in run.output)
    part = json.loads((run.directory / "environment.json").read_text())["parts"][-1]
    context.require(f"its environment is {context.device}", part["device"] == context.device)
    if context.on_gpu("the GPU's name in the report"):
        page = (run.directory / "report.html").read_text(encoding="utf-8")
        context.require("its report names the GPU", torch.cuda.get_device_name() in page)
    return run


def slow_reward(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that takes its time and notes in which thread it was asked."""
    _in_main_thread.append(threading.current_thread() is threading.main_thread())
    time.sleep(REWARD_SECONDS)
    return [float(len(response)) for response in responses]


def reward_overlaps(context: Context) -> None:
    """The reward scores in the background while the reference's log-probs are computed.

    The reference takes a few samples at a time, which lasts longer than to make texts of the responses.
    """
    _in_main_thread.clear()
    reward, few = f"{__name__}:slow_reward", context.sized(4, 2)
    run = train_here(context, "overlap", reward=reward, mixed_precision="bf16", rollout_microbatch_size=few)
    waited = [step["time/score_seconds"] for step in run.steps]
    context.measure(score_seconds=waited, reference_seconds=[step["time/reference_seconds"] for step in run.steps])
    context.require("the reward was asked in every step", len(_in_main_thread) >= len(run.steps))
    if context.on_gpu("the overlap: a CPU scores after the reference has run"):
        asked = _in_main_thread[-len(run.steps) :]
        context.require("it was asked in a thread of its own", not any(asked))
        context.require(f"all steps waited for less than {REWARD_SECONDS} s", max(waited) < REWARD_SECONDS)
    else:
        context.require(f"all steps waited for {REWARD_SECONDS} s", min(waited) >= REWARD_SECONDS)


def profile(context: Context) -> None:
    """`--profile 2` writes its table and its trace."""
    smaller = context.sized({}, {"rollout_batch_size": 4, "response_max_tokens": 3})
    run = train_here(context, "profiled", mixed_precision="bf16", profile=2, **smaller)
    table = (run.directory / "profile" / "step_2.txt").read_text(encoding="utf-8")
    trace = json.loads((run.directory / "profile" / "step_2.json").read_text(encoding="utf-8"))["traceEvents"]
    kind = context.sized("kernel", "cpu_op")
    work = [(e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in trace if e.get("cat") == kind]
    context.measure(rows=len(table.splitlines()), pieces_of_work=len(work), busy_seconds=busy_seconds(work))
    context.require("the table has ten operations", len(table.splitlines()) >= 14)
    context.require("the trace has the device's work", len(work) > 100)
    if context.on_gpu("the CUDA column of the table"):
        context.require("the table is sorted by the GPU's time", "Self CUDA" in table)
