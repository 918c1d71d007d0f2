"""Recomputed and compiled blocks give the same losses and gradients as plain ones."""

import shutil

import pytest
import torch
from conftest import SHAPES, random_causal_lm
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.models.loading import LoraSettings, ModelError, add_lora
from pipeline.models.packing import pack
from pipeline.models.policy import Policy

TOKENS = torch.randint(1, 250, (6, 12), generator=torch.Generator().manual_seed(0))


def policy_of(architecture, tokenizer, *, lora=False):
    model = random_causal_lm(architecture, tokenizer, scale=2.0)
    if lora:
        model = add_lora(model, LoraSettings(4, 8, None, seed=0))
    policy = Policy(model).eval()
    torch.nn.init.normal_(policy.value_head.weight)
    return policy


def samples(policy, count=6):
    lengths = torch.tensor([[4, 8], [2, 5], [3, 3], [4, 1], [1, 8], [4, 6]])[:count].numpy()
    return pack(TOKENS[:count], lengths, 8, policy.layout)


def trained(policy, packed):
    """Log-probs, values, and the gradient of every trainable weight."""
    policy.zero_grad()
    outputs = policy(packed, 0.9, token_loss=lambda logprobs, _rows: logprobs.square(), scale=0.1)
    (outputs.loss + outputs.values.square().sum()).backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}
    return {"logprobs": outputs.logprobs, "values": outputs.values.detach(), **gradients}


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


@pytest.mark.parametrize("lora", (False, True))
@pytest.mark.parametrize("architecture", SHAPES)
def test_recomputing_changes_no_number_and_keeps_less(architecture, lora, tokenizer):
    policy = policy_of(architecture, tokenizer, lora=lora)
    packed, found, kept = samples(policy), [], []
    for recompute in (False, True):
        if recompute:
            policy.recompute()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            found.append(trained(policy, packed))
        kept.append(len(saved))
    assert_same(found[1], found[0], 1e-6)
    assert kept[1] < kept[0] / 2


def test_recomputing_leaves_dropout_off_and_the_cache_of_sampling_alone(tokenizer):
    policy = policy_of("gpt2", tokenizer)
    blocks = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = []
    for module in policy.modules():
        module.register_forward_pre_hook(lambda module, _: inside.append((module, module.training)))
    policy.recompute()
    trained(policy, samples(policy))
    assert {module for module, training in inside if training} == set(blocks)
    assert not any(module.training for module in policy.modules())
    with torch.no_grad():
        assert policy.model(TOKENS, use_cache=True).past_key_values.get_seq_length() == TOKENS.shape[1]


def test_a_model_that_cannot_recompute_is_named(tokenizer):
    policy = policy_of("gpt2", tokenizer)
    policy.model.transformer.h = torch.nn.ModuleList()
    with pytest.raises(ModelError, match="gradient_checkpointing=True: GPT2LMHeadModel"):
        policy.recompute()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_give_the_same_gradients_for_other_shapes_too_and_add_no_weights(tokenizer):
    plain, compiled = (policy_of("gpt2", tokenizer) for _ in range(2))
    compiled.compile_trunk()
    for count in (6, 3):
        assert_same(trained(compiled, samples(compiled, count)), trained(plain, samples(plain, count)), 1e-5)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in compiled.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_a_head_that_is_not_plain_is_not_compiled(tokenizer):
    policy = policy_of("gpt2", tokenizer)
    policy.layout = policy.layout.__class__(True, 2**31, False)
    with pytest.raises(ModelError, match="torch_compile=True: the head of GPT2LMHeadModel"):
        policy.compile_trunk()
