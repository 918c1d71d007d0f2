"""Runs `pipeline.train` and keeps what happened: RECORD_DIR=d accelerate launch … tests/recorded_run.py …

Every worker's rollouts go to d/rank<n>.pt, the saved model's logits for some tokens to d/logits.pt.
"""

import os
from pathlib import Path

import torch

from pipeline import train
from pipeline.trainer import PPOTrainer

RECORD = Path(os.environ.get("RECORD_DIR", "."))
PROBE = torch.arange(12).view(2, 6)
gather, save_policy = PPOTrainer.gather, train.save_policy
rollouts = []


def recording(self, mine):
    rollout = gather(self, mine)
    rollouts.append(vars(rollout))
    torch.save(rollouts, RECORD / f"rank{self.accelerator.process_index}.pt")
    return rollout


def saving(policy, *arguments, **settings):
    save_policy(policy, *arguments, **settings)
    with torch.no_grad():
        torch.save(policy.model(input_ids=PROBE).logits, RECORD / "logits.pt")


if __name__ == "__main__":
    PPOTrainer.gather, train.save_policy = recording, saving
    train.main()
