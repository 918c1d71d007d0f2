"""Runs `pipeline.train` under FSDP2 on CPU processes, one training after the other:

    accelerate launch … tests/fsdp_runs.py DIRECTORY --config RECIPE …     # settings for all; those of each are in RUNS

Accelerate prepares FSDP2 on GPUs only. Its state there, made of what the launcher says, is set here by hand; all that
follows is Accelerate's own. DIRECTORY/<run> gets the run's output and what each worker saw of it.
"""

import os
import sys
from pathlib import Path

import recorded_run
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from pipeline import train, update
from pipeline.runtime import distributed
from pipeline.runtime.signals import StopRequest

STEPS = 3
KEEP_ALL = ("--save_every_steps", "1", "--keep_last", str(STEPS + 1))
NOT_EVALUATED = ("--evaluation_prompts", "0")
LORA = ("--use_peft", "--lora_r", "4", *NOT_EVALUATED)
ONE_STEP = ("--steps", "1", "--save_every_steps", "0", *NOT_EVALUATED)
BF16 = ("--mixed_precision", "bf16", *ONE_STEP)
FP16 = ("--mixed_precision", "fp16", *ONE_STEP)
RUNS = {
    "full": KEEP_ALL,
    "resumed": (*KEEP_ALL, *NOT_EVALUATED),  # from the first step's checkpoint of `full`
    "lora": (*LORA, *KEEP_ALL),
    "bf16": BF16,
    "fp16": FP16,
    "spoilt": ("--save_every_steps", "1"),  # one worker's losses are no numbers from the third minibatch on
}
LOSS_SCALE = 2.0**20  # too large for float16: it has to come down by itself
run, backward = train.run, update.backward


def on_cpu(**settings) -> Accelerator:
    accelerator = Accelerator(**settings)
    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    if accelerator.mixed_precision == "fp16":
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def watched(trainer, *arguments):
    """Run, and keep what the engine gave and what the optimizer holds at the end."""
    outputs, lm = [], trainer.policy.model
    trainer.engine.register_forward_hook(lambda _module, _inputs, found: outputs.append(tensors(found)))
    failure = run(trainer, *arguments)
    assert isinstance(trainer.engine, FSDPModule)
    optimizer, scaler = trainer.optimizer.optimizer, trainer.accelerator.scaler
    seen = {
        "tied": lm.get_input_embeddings().weight is lm.get_output_embeddings().weight,
        "trainable": sum(parameter.requires_grad for parameter in trainer.engine.parameters()),
        "optimized": sum(len(group["params"]) for group in optimizer.param_groups),
        "adam_steps": {state["step"].item() for state in optimizer.state.values()},
        "shared": all(parameter.to_local().numel() < parameter.numel() for parameter in lm.parameters()),
        "outputs": [found for found in outputs if "loss" in found],  # of the updates
        "loss_scale": None if scaler is None else scaler.get_scale(),
    }
    torch.save(seen, recorded_run.RECORD / f"seen{trainer.accelerator.process_index}.pt")
    return failure


def tensors(outputs) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in outputs._asdict().items() if value is not None}


def spoiling():
    """`update.backward` of a worker whose loss is no number from the third minibatch on."""
    minibatches = 0

    def spoilt(accelerator, engine, loss, *, last):
        nonlocal minibatches
        backward(accelerator, engine, loss * float("nan") if minibatches >= 2 else loss, last=last)
        minibatches += last

    return spoilt


def main() -> None:
    directory, arguments = Path(sys.argv[1]), sys.argv[2:]
    recorded_run.record()
    distributed.Accelerator, train.run = on_cpu, watched
    distributed.precision = lambda _accelerator: "as on a GPU"  # float16, refused on a CPU, is made up in `on_cpu`
    for name, settings in RUNS.items():
        AcceleratorState._reset_state()
        GradientState._reset_state()
        recorded_run.RECORD = directory / name
        recorded_run.RECORD.mkdir(exist_ok=True)
        recorded_run.rollouts.clear()
        recorded_run.addresses.clear()
        resume = ("--resume", directory / "full" / "run" / "checkpoints" / "step_000001") if name == "resumed" else ()
        update.backward = spoiling() if name == "spoilt" and os.environ["RANK"] == "1" else backward
        options = (*arguments, *settings, *resume, "--output_dir", directory / name / "run")
        sys.argv = ["train", *map(str, options)]
        with StopRequest() as stop:
            code, _ = train.start_and_run(stop)
        (recorded_run.RECORD / f"code{os.environ['RANK']}").write_text(str(code))


if __name__ == "__main__":
    main()
