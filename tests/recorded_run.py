"""Runs `pipeline.train` and keeps what happened: RECORD_DIR=d accelerate launch … tests/recorded_run.py …

Every worker's rollouts go to d/rank<n>.pt, the saved model's logits for some tokens to d/logits.pt.
"""

import os
from pathlib import Path

import torch

from pipeline import train
from pipeline.runtime.engine import gathered, moving_weights, zero_stage
from pipeline.trainer import PPOTrainer

RECORD = Path(os.environ.get("RECORD_DIR", "."))
PROBE = torch.arange(12).view(2, 6)
gather, full_state_dict, make_accelerator = PPOTrainer.gather, train.full_state_dict, train.make_accelerator
rollouts, addresses = [], []


def recording(self, *arguments):
    rollout = gather(self, *arguments)
    rollouts.append(vars(rollout))
    addresses.append([parameter.data_ptr() for parameter in self.policy.parameters()])
    if moving_weights(self.accelerator) is None:  # or a graph would read them where they were
        assert addresses[0] == addresses[-1]
    torch.save(rollouts, RECORD / f"rank{self.accelerator.process_index}.pt")
    return rollout


def saving(accelerator, engine):
    model = accelerator.unwrap_model(engine).model
    with torch.no_grad(), gathered(engine):
        logits = model(input_ids=PROBE, attention_mask=torch.ones_like(PROBE)).logits
    if accelerator.is_main_process:
        torch.save(logits, RECORD / "logits.pt")
    return full_state_dict(accelerator, engine)


def sharding(mixed_precision):
    accelerator = make_accelerator(mixed_precision)
    if zero_stage(accelerator) == 3:  # DeepSpeed leaves parameters as small as the tests' on every worker
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    return accelerator


def record() -> None:
    PPOTrainer.gather, train.full_state_dict, train.make_accelerator = recording, saving, sharding


if __name__ == "__main__":
    record()
    train.main()
