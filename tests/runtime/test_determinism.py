"""The update of a GPU in PyTorch's deterministic mode; what has none is found out at the start, and a CPU is let be."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from test_update import TEMPERATURE, advantages, fresh_policy, rollout, settings

from pipeline import update
from pipeline.models.packing import pack
from pipeline.runtime import distributed
from pipeline.runtime.determinism import deterministic, reserve_workspace

# ruff: noqa: F401, F811 - fixtures of test_update
CUDA = torch.device("cuda")


def modes() -> tuple[int, bool]:
    return torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The update takes a CPU for a GPU where it asks for deterministic operations."""
    monkeypatch.setattr(update, "deterministic", lambda _device: deterministic(CUDA))


def test_on_cuda_what_cannot_repeat_raises_and_the_mode_ends_with_the_context():
    before = modes()
    with pytest.raises(KeyError), deterministic(CUDA):
        assert modes() == (2, False), "a warning alone would leave attention's backward as it is"
        raise KeyError
    assert modes() == before == (0, True)


def test_on_a_cpu_nothing_changes():
    with deterministic(torch.device("cpu")):
        assert modes() == (0, True)


@pytest.mark.parametrize(("given", "used"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_cublas_repeats_itself_in_the_workspace_of_the_user_or_else_ours(monkeypatch, given, used):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given or "")
    if given is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    reserve_workspace()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == used


@pytest.mark.parametrize(("device", "precision", "products"), [
    ("cuda", "no", "highest"), ("cuda", "bf16", "high"), ("cpu", "no", "high"),
])  # fmt: skip
def test_on_cuda_attention_is_not_cudnns_and_float32_is_not_tf32(monkeypatch, device, precision, products):
    made = SimpleNamespace(device=torch.device(device), num_processes=1, is_main_process=True,
                           distributed_type=DistributedType.NO, mixed_precision=precision)  # fmt: skip
    monkeypatch.setattr(distributed, "cuda_is_usable", lambda: device == "cuda")
    monkeypatch.setattr(distributed, "Accelerator", lambda **_settings: made)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 makes it
    try:
        distributed.make_accelerator(precision)
        assert torch.get_float32_matmul_precision() == products
        assert torch.backends.cuda.cudnn_sdp_enabled() == (device == "cpu")
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


@pytest.mark.parametrize("repeatable", (True, False))
def test_forward_and_backward_of_the_update_are_in_the_mode_and_the_optimizer_is_not(
    tokenizer, rollout, advantages, as_on_cuda, monkeypatch, repeatable
):
    seen: dict[str, set[int]] = {"forward": set(), "backward": set(), "step": set()}

    def watch(name):
        seen[name].add(torch.get_deterministic_debug_mode())

    accelerator, policy = Accelerator(cpu=True), fresh_policy(tokenizer)
    policy.repeatable = repeatable
    policy.model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: watch("forward"))
    policy.model.transformer.wpe.weight.register_hook(lambda _gradient: watch("backward"))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    optimizer.register_step_pre_hook(lambda *_: watch("step"))
    arguments = {"step": 0, "seed": 0, "temperature": TEMPERATURE}
    update.first_epoch_outputs(accelerator, policy, rollout, settings(), **arguments)
    update.update_policy(
        accelerator, policy, optimizer, rollout, advantages, settings(), **arguments, layout=policy.layout
    )
    mode = {2} if repeatable else {0}
    assert seen == {"forward": mode, "backward": mode, "step": {0}}


class Nondeterministic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        torch._C._get_deterministic_algorithms() and _refuse()
        return gradient


def _refuse():
    raise RuntimeError("histc_cuda does not have a deterministic implementation, but you set …\nmore")


@pytest.mark.parametrize("lora", (False, True))
def test_a_model_that_cannot_repeat_is_found_out_at_the_start_and_said(tokenizer, as_on_cuda, recwarn, lora):
    policy = fresh_policy(tokenizer)
    if lora:
        policy.requires_grad_(False)
        policy.model.transformer.h[0].attn.c_attn.weight.requires_grad_()
    packed = pack(torch.zeros(1, 3, dtype=torch.long), np.array([[1, 2]]), 2, policy.layout)
    assert update._is_repeatable(policy, packed) and not recwarn
    assert all(parameter.grad is None for parameter in policy.parameters())
    policy.model.transformer.h[1].register_forward_pre_hook(
        lambda _module, inputs: (Nondeterministic.apply(inputs[0]), *inputs[1:])
    )
    with pytest.warns(UserWarning, match="will not end with the same bits: histc_cuda does not have"):
        assert not update._is_repeatable(policy, packed)
    assert modes() == (0, True)
