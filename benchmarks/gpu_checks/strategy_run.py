"""Trainings under one strategy, one after another in the same workers, and what each worker saw of them.

    accelerate launch … -m benchmarks.gpu_checks.strategy_run DIRECTORY PLAN.json

PLAN.json has for each training its name, its command line, and whether the second worker is to crash in it. Each worker
writes DIRECTORY/<name>/seen_<rank>.json; a training that hangs ends with the stack of every thread.
"""

import faulthandler
import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from pipeline import train
from pipeline.errors import worker_faults
from pipeline.runtime.engine import autocast
from pipeline.runtime.signals import StopRequest

TEXT = ("This film was", " a delight from its first minute to its last.")
RANK = int(os.environ["RANK"])
run = train.run


def watched(folder: Path, crashes: bool):
    """`train.run` that notes what the engine gave and what the optimizer holds."""

    def run_and_note(trainer, *arguments):
        dtypes = set()

        def note(_module, _inputs, outputs) -> None:
            dtypes.update(str(value.dtype) for value in outputs._asdict().values() if value is not None)

        def crash(_module, _inputs, named) -> None:
            if named.get("token_loss") is not None:
                (folder / "crashed_at").write_text(str(time.time()))
                raise ZeroDivisionError("the crash of one worker that was asked for")

        trainer.engine.register_forward_hook(note)
        if crashes and RANK == 1:
            trainer.engine.register_forward_pre_hook(crash, with_kwargs=True)
        failure = run(trainer, *arguments)
        lm, optimizer = trainer.policy.model, innermost(trainer.optimizer)
        with autocast(trainer.accelerator):
            scores = trainer.reward.text_scores([TEXT[0]], [TEXT[1]])
        seen = {
            "device": str(trainer.accelerator.device),
            "tied": lm.get_input_embeddings().weight is lm.get_output_embeddings().weight,
            "trainable": [name for name, p in trainer.policy.named_parameters() if p.requires_grad],
            "optimized": sum(len(group["params"]) for group in optimizer.param_groups),
            "adam_steps": sorted({float(state["step"]) for state in optimizer.state.values()}),
            "output_types": sorted(dtypes),
            "scores": {name: float(value) for name, value in scores.items()},
        }
        (folder / f"seen_{RANK}.json").write_text(json.dumps(seen))
        return failure

    return run_and_note


def innermost(optimizer) -> torch.optim.Optimizer:
    """The Adam inside Accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def main() -> None:
    directory, plan = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for training in plan["trainings"]:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        folder = directory / training["name"]
        folder.mkdir(parents=True, exist_ok=True)
        train.run = watched(folder, training["crashes"])
        sys.argv = ["train", *training["settings"]]
        faulthandler.dump_traceback_later(plan["seconds"], exit=True)
        with worker_faults(), StopRequest() as stop:
            code, failure = train.start_and_run(stop)
        faulthandler.cancel_dump_traceback_later()
        (folder / f"code_{RANK}").write_text(str(code))
        if code:
            print(f"{training['name']} ended with {code}: {failure}", flush=True)
    sys.stdout.flush()
    os._exit(0)  # as pipeline.errors.end_worker does


if __name__ == "__main__":
    main()
