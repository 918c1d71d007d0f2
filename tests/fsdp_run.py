"""Shards a policy over CPU processes with FSDP2, as Accelerate would on GPUs: accelerate launch … fsdp_run.py MODEL DIR

Accelerate has no FSDP on CPU, so this goes to torch's `fully_shard` itself and asks what the engine's calls do with it,
and whether what Accelerate writes into DIR is read back whole.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import save_fsdp_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pipeline.models.building import build_policy_and_reference
from pipeline.models.packing import pack
from pipeline.runtime.checkpoints import FSDP_FOLDER, joined_by_torch
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.engine import gathered, settle

TOKENS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])


def outputs(policy, layout):
    samples = pack(TOKENS, np.array([[2, 3], [2, 3]]), 3, layout)
    return policy(samples, token_loss=lambda logprobs, _rows: logprobs.square())


def main() -> None:
    accelerator = make_accelerator("no")
    whole, _ = build_policy_and_reference(sys.argv[1], lora=None, device="cpu")
    policy, _ = build_policy_and_reference(sys.argv[1], lora=None, device="cpu")
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    for block in policy.model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    expected = outputs(whole, whole.layout)
    (expected.loss + expected.values.sum()).backward()
    settle(accelerator, policy, torch.optim.SGD(policy.parameters()), lambda: outputs(policy, whole.layout))
    for _ in range(2):  # rollout and update in turn, as training does
        with torch.no_grad(), gathered(policy):
            direct = policy.model(input_ids=TOKENS).logits  # sampling goes around the engine
            torch.testing.assert_close(direct, whole.model(input_ids=TOKENS).logits)
            torch.testing.assert_close(outputs(policy, whole.layout).logprobs, expected.logprobs)
        assert all(
            parameter.to_local().numel() < parameter.numel() for parameter in policy.model.transformer.h.parameters()
        )
        found = outputs(policy, whole.layout)
        (found.loss + found.values.sum()).backward()
        for (name, one), two in zip(whole.named_parameters(), policy.parameters(), strict=True):
            torch.testing.assert_close(two.grad.full_tensor(), one.grad, msg=name)
        policy.zero_grad()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    save_fsdp_model(plugin, accelerator, policy, sys.argv[2])
    accelerator.wait_for_everyone()
    found = joined_by_torch(Path(sys.argv[2]) / FSDP_FOLDER)
    for name, one in whole.named_parameters():
        assert torch.equal(found[name], one.detach()), name
    print("as whole weights do")


if __name__ == "__main__":
    main()
