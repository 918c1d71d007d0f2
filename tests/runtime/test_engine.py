"""What does not go with a way of sharding is refused by name, and so is what a wrapping lost."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

from pipeline.models.building import build_policy_and_reference
from pipeline.runtime.engine import EngineError, check_can_compile, moving_weights, prepare_engine
from pipeline.runtime.fsdp import adopt_fsdp
from pipeline.runtime.weights import trained_numbers


def accelerator(kind, stage=0, processes=2):
    plugin = SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(
        distributed_type=kind, num_processes=processes, state=SimpleNamespace(deepspeed_plugin=plugin)
    )


@pytest.mark.parametrize(
    ("kind", "stage", "name"), [(DistributedType.DEEPSPEED, 3, "zero3"), (DistributedType.FSDP, 0, "fsdp2")]
)
def test_blocks_whose_weights_come_and_go_are_not_compiled(kind, stage, name):
    with pytest.raises(EngineError, match=f"torch_compile=True does not go with {name}"):
        check_can_compile(accelerator(kind, stage))


@pytest.mark.parametrize(("kind", "stage"), [(DistributedType.DEEPSPEED, 2), (DistributedType.MULTI_GPU, 0)])
def test_blocks_whose_weights_stay_may_be_compiled(kind, stage):
    check_can_compile(accelerator(kind, stage))


@pytest.mark.parametrize(
    ("kind", "stage", "processes", "why"),
    [
        (DistributedType.NO, 0, 1, None),
        (DistributedType.MULTI_GPU, 0, 2, None),
        (DistributedType.DEEPSPEED, 1, 2, None),
        (DistributedType.DEEPSPEED, 2, 2, None),
        (DistributedType.DEEPSPEED, 3, 2, "zero3 moves the weights about"),
        (DistributedType.FSDP, 0, 2, "fsdp2 moves the weights about"),
    ],
)
def test_graphs_go_with_what_leaves_the_weights_in_their_place(kind, stage, processes, why):
    assert moving_weights(accelerator(kind, stage, processes)) == why


def fsdp(precision="no", **settings):
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **settings})
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(distributed_type=DistributedType.FSDP, state=state, mixed_precision=precision)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"fsdp_version": 1}, "fsdp_version=1 is not supported; write fsdp_version: 2"),
        ({"state_dict_type": "FULL_STATE_DICT"}, "fsdp_state_dict_type=FULL_STATE_DICT .* SHARDED_STATE_DICT"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing=True .* --gradient_checkpointing true"),
    ],
)
def test_an_fsdp_configuration_that_this_project_cannot_follow_is_refused_with_the_remedy(settings, told):
    with pytest.raises(EngineError, match=told):
        adopt_fsdp(fsdp(**settings))


def test_under_fsdp_every_worker_opens_whole_models_and_nothing_is_rounded(monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    found = fsdp(mixed_precision_policy="bf16")
    adopt_fsdp(found)
    plugin = found.state.fsdp_plugin
    assert plugin.mixed_precision_policy is None and plugin.cpu_ram_efficient_loading is False
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"  # transformers opens models by it


def untie(policy, optimizer):
    policy.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight.detach().clone())
    optimizer.add_param_group({"params": policy.model.lm_head.weight})
    return policy, optimizer


def forget(policy, optimizer):
    group = optimizer.param_groups[0]
    group["params"] = [parameter for parameter in group["params"] if parameter is not policy.value_head.bias]
    return policy, optimizer


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (untie, "ddp as it is configured parts model.lm_head.weight from model.transformer.wte.weight"),
        (forget, "ddp as it is configured leaves value_head.bias out of the optimizer"),
    ],
)
def test_a_wrapping_that_parts_tied_weights_or_leaves_one_untrained_is_refused(tiny_lm, wrap, told):
    policy, _ = build_policy_and_reference(tiny_lm, lora=None, device="cpu")
    optimizer = torch.optim.AdamW(policy.parameters())
    wrapping = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, num_processes=2, prepare=wrap)
    sizes = {"microbatch_size": 1, "microbatches": 1, "max_grad_norm": 1.0, "outside": ()}
    with pytest.raises(EngineError, match=told):
        prepare_engine(wrapping, policy, optimizer, **sizes)
    kept = SimpleNamespace(**{**vars(wrapping), "prepare": lambda *both: both})
    policy, _ = build_policy_and_reference(tiny_lm, lora=None, device="cpu")
    prepare_engine(kept, policy, torch.optim.AdamW(policy.parameters()), **sizes)


def test_what_zero3_has_shared_out_is_counted_whole():
    module = torch.nn.Linear(3, 4)
    module.weight.data = torch.empty(0)
    module.weight.ds_numel = 12  # DeepSpeed's note
    assert trained_numbers(module) == 16
