"""Runs `pipeline.train` and keeps every worker's rollouts: RECORD_DIR=d accelerate launch … tests/recorded_run.py …"""

import os
from pathlib import Path

import torch

from pipeline import train
from pipeline.trainer import PPOTrainer

original = PPOTrainer.gather
rollouts = []


def recording(self, mine):
    rollout = original(self, mine)
    rollouts.append(vars(rollout))
    torch.save(rollouts, Path(os.environ["RECORD_DIR"]) / f"rank{self.accelerator.process_index}.pt")
    return rollout


if __name__ == "__main__":
    PPOTrainer.gather = recording
    train.main()
