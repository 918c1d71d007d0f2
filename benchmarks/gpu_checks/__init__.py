"""The checks of `python -m benchmarks.gpu`: which there are, in the order they run.

Each is a function of a module here that takes a `Context` and leaves in it what it measured and which conditions held.
They run in worker processes (`worker.py`, started by `processes.py`), so importing this imports none of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One check: `module` is its group, `function` its name there."""

    module: str
    function: str
    seconds: float  # it is ended after; several times what it should take

    @property
    def name(self) -> str:
        return f"{self.module.rpartition('.')[2]}/{self.function}"


def _group(module: str, **seconds: float) -> list[Check]:
    return [Check(f"benchmarks.gpu_checks.{module}", function, limit) for function, limit in seconds.items()]


CHECKS = [
    *_group("machine", versions=60, accelerator=60, launcher=60, attention_backends=60),
    *_group(
        "kernels", head_loss=60, head_logprobs=60, logits_logprobs=60, inverse_cdf=60, fast_kernels=60,
        many_forwards=60, packed_as_alone=60,
    ),
    *_group("graphs", gpt2=90, lora=90, grouped_query=90),
    *_group("syncs", decode_step=60, minibatch_loop=60, whole_step=60),
    *_group(
        "training", full_no=90, full_bf16=90, full_fp16=90, lora_no=90, lora_bf16=90, lora_fp16=90,
        gradient_checkpointing=90, torch_compile=180, reward_overlaps=90, profile=90,
    ),
    *_group("bits", same_run_twice=90, checkpoints_change_nothing=90, resumed=120),
    *_group(
        "strategies", multi_gpu=200, zero1=200, zero2=200, zero3=200, zero3_offload=200, fsdp2=200,
        shard_reference=60, crash_of_one_worker=90,
    ),
    *_group(
        "speed", start_up=120, phases=120, decoding=90, update_profile=90, attention=90, head_columns=60, packing=60,
        checkpoint=60, largest_microbatch=120, recipe=30, data_parallel=300,
    ),
]  # fmt: skip
