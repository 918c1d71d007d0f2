"""Policy and reference: what they read from a padded batch is what the plain model says of each sample alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHAPES, random_causal_lm
from peft import PeftModel

from pipeline.models.building import build_policy_and_reference
from pipeline.models.loading import LoraSettings, add_lora, load_causal_lm
from pipeline.models.packing import Packed, pack
from pipeline.models.policy import Policy, Reference, ResponseOutputs

ARCHITECTURES = tuple(SHAPES)
PROMPTS = ([5, 6, 7, 8], [9], [10, 11])
RESPONSES = ([20, 21, 22], [23, 24, 25, 26, 27], [28])
WIDTH, LENGTH = 4, 5


def packed(layout, pad: int = 0) -> Packed:
    """The samples above, prompts left-padded to 4 and responses right-padded to 5 beforehand."""
    tokens = [
        [pad] * (WIDTH - len(p)) + p + r + [pad] * (LENGTH - len(r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    lengths = np.array([[len(p), len(r)] for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    return pack(torch.tensor(tokens), lengths, LENGTH, layout)


def alone(model, prompt, response):
    """Logits (n, V) and last hidden states (n, H) before each response token of one unpadded sequence."""
    output = model(torch.tensor([prompt + response]), output_hidden_states=True)
    before = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    return output.logits[0, before], output.hidden_states[-1][0, before]


def read(policy: Policy, temperature: float = 1.0, *, pad: int = 0) -> ResponseOutputs:
    """What the policy says of the samples, each (3, LENGTH)."""
    samples = packed(policy.layout, pad)
    with torch.no_grad():
        outputs = policy(samples, temperature, with_entropy=True)
    return ResponseOutputs(*(samples.unpack(x) for x in (outputs.logprobs, outputs.values, outputs.entropy)), None)


def reference_logprobs(reference: Reference, temperature: float = 1.0) -> torch.Tensor:
    samples = packed(reference.layout)
    return samples.unpack(reference.logprobs(samples, temperature))


def policy_with_random_head(model) -> Policy:
    policy = Policy(model).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(policy.value_head.weight)
    torch.nn.init.normal_(policy.value_head.bias)
    return policy


def perturb_adapter(model) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_equal_the_plain_model_on_each_sequence_alone(architecture, tokenizer):
    model = random_causal_lm(architecture, tokenizer)
    policy = policy_with_random_head(model)
    for temperature in (1.0, 0.7):
        with torch.no_grad():
            outputs = read(policy, temperature)
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            n = len(response)
            with torch.no_grad():
                logits, hidden = alone(model, prompt, response)
            logprobs = (logits / temperature).log_softmax(-1)
            close(outputs.logprobs[i, :n], logprobs[range(n), response])
            close(outputs.values[i, :n], hidden @ policy.value_head.weight[0].detach() + policy.value_head.bias.item())
            close(outputs.entropy[i, :n], -(logprobs.exp() * logprobs).sum(-1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("plain_head", (True, False))
def test_gradients_of_a_batch_are_those_of_the_plain_model_on_each_sequence_alone(architecture, plain_head, tokenizer):
    policy = policy_with_random_head(random_causal_lm(architecture, tokenizer))
    policy.layout = replace(policy.layout, plain_head=plain_head)  # False: by the path for heads that are not
    samples, weights = packed(policy.layout), torch.linspace(-1, 1, sum(map(len, RESPONSES)))
    outputs = policy(samples, 0.7, token_loss=lambda logprobs, rows: weights[rows] * logprobs.square(), scale=0.5)
    (outputs.loss + outputs.values.sum()).backward()
    found = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    at, losses = 0, []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        n = len(response)
        logits, hidden = alone(policy.model, prompt, response)
        logprobs = (logits / 0.7).log_softmax(-1)[range(n), response]
        losses.append(0.5 * (weights[at : at + n] * logprobs.square()).sum())
        (losses[-1] + policy.value_head(hidden).sum()).backward()
        at += n
    close(outputs.loss, sum(losses))
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-4, rtol=1e-4, msg=name)


def test_what_the_padding_tokens_are_changes_nothing(tokenizer):
    policy = policy_with_random_head(random_causal_lm("gpt2", tokenizer))
    zeros, others = (read(policy, pad=pad) for pad in (0, 17))
    for name in ("logprobs", "values", "entropy"):
        close(getattr(zeros, name), getattr(others, name))


def test_values_start_at_zero_and_the_head_is_float32(tokenizer):
    policy = Policy(random_causal_lm("gpt2", tokenizer).to(torch.bfloat16))
    outputs = policy(packed(policy.layout))
    assert (outputs.values == 0).all() and outputs.entropy is None
    assert policy.value_head.weight.dtype == outputs.values.dtype == outputs.logprobs.dtype == torch.float32


def test_a_prompt_of_one_token_and_a_response_of_one_token(tokenizer):
    model = random_causal_lm("gpt2", tokenizer)
    policy = Policy(model)
    outputs = policy(pack(torch.tensor([[3, 4]]), np.array([[1, 1]]), 1, policy.layout))
    logits, _ = alone(model, [3], [4])
    close(outputs.logprobs, logits.log_softmax(-1)[:, 4])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_lora_reference_is_the_base_bit_for_bit_and_copies_nothing(architecture, tokenizer):
    base = reference_logprobs(Reference(random_causal_lm(architecture, tokenizer)), 0.7)
    model = add_lora(random_causal_lm(architecture, tokenizer), LoraSettings(4, 8, None, seed=0))
    perturb_adapter(model)
    policy, reference = Policy(model), Reference(model)
    before = [parameter.data_ptr() for parameter in policy.model.parameters()]

    assert reference.is_shared
    assert torch.equal(reference_logprobs(reference, 0.7), base)
    with torch.no_grad():
        assert (read(policy, 0.7).logprobs - base).abs().max() > 0.01
    assert torch.equal(reference_logprobs(reference, 0.7), base)  # the adapter's return changed nothing

    with reference.activated() as active:
        assert [parameter.data_ptr() for parameter in active.parameters()] == before


def test_the_adapter_is_on_again_after_the_reference_failed(tokenizer):
    model = add_lora(random_causal_lm("gpt2", tokenizer), LoraSettings(4, 8, None, seed=0))
    perturb_adapter(model)
    with torch.no_grad():
        before = read(Policy(model)).logprobs
        with pytest.raises(KeyError), Reference(model).activated():
            raise KeyError
        assert torch.equal(read(Policy(model)).logprobs, before)


def test_lora_trains_the_adapter_and_the_value_head_only_and_starts_at_the_base(tiny_lm):
    policy, reference = build_policy_and_reference(tiny_lm, lora=LoraSettings(4, 8, None, seed=0), device="cpu")
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if "lora_" not in name} == {"value_head.weight", "value_head.bias"}
    assert len(trainable) == 2 + 2 * 2  # A and B of the attention projection of each of two layers
    with torch.no_grad():
        assert torch.equal(read(policy).logprobs, reference_logprobs(reference))


def test_fresh_adapters_follow_from_their_seed_alone(tokenizer):
    def start(seed, noise=0):
        model = random_causal_lm("gpt2", tokenizer)
        torch.manual_seed(noise)
        model = add_lora(model, LoraSettings(4, 8, None, seed=seed))
        return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_A" in name])

    first = start(0)
    assert torch.equal(start(0, noise=99), first) and not torch.equal(start(1), first)


def test_lora_scale_is_alpha_over_rank(tokenizer):
    model = add_lora(random_causal_lm("gpt2", tokenizer), LoraSettings(4, 8, None, seed=0))
    layer = model.get_base_model().transformer.h[0].attn.c_attn
    perturb_adapter(model)
    x = torch.randn(1, 3, 32)
    low_rank = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x) - layer.base_layer(x), 2 * low_rank, atol=1e-5, rtol=1e-5)


def test_the_full_reference_is_frozen_and_stays_when_the_policy_moves(tiny_lm):
    policy, reference = build_policy_and_reference(tiny_lm, lora=None, device="cpu")
    assert not reference.is_shared
    with torch.no_grad():
        start = read(policy).logprobs
        assert torch.equal(reference_logprobs(reference), start)
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert (read(policy).logprobs - start).abs().max() > 0.01
    assert torch.equal(reference_logprobs(reference), start)
    with reference.activated() as model:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
    assert not policy.training and all(parameter.requires_grad for parameter in policy.parameters())


@pytest.fixture(scope="module")
def adapter(tiny_lm, tmp_path_factory):
    """The folder of a trained adapter of `tiny_lm`."""
    model = add_lora(load_causal_lm(tiny_lm), LoraSettings(4, 8, None, seed=0))
    torch.manual_seed(3)
    perturb_adapter(model)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return str(folder)


def test_an_adapter_to_start_from_stays_in_the_reference(tiny_lm, adapter):
    plain = PeftModel.from_pretrained(load_causal_lm(tiny_lm), adapter).eval()
    expected = reference_logprobs(Reference(plain.get_base_model()))  # adapter on
    policy, reference = build_policy_and_reference(
        tiny_lm, lora=LoraSettings(16, 32, None, seed=0), adapter_path=adapter, device="cpu"
    )
    base, _ = build_policy_and_reference(tiny_lm, lora=None, device="cpu")
    with torch.no_grad():
        close(read(policy).logprobs, expected)  # the plain model has other kernels
        close(reference_logprobs(reference), expected)
        assert (read(base).logprobs - expected).abs().max() > 0.01
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
                assert ".reference." not in name
        assert (read(policy).logprobs - expected).abs().max() > 0.01
        close(reference_logprobs(reference), expected)


def test_the_adapter_in_training_is_back_after_the_reference_was_asked(tiny_lm, adapter):
    policy, reference = build_policy_and_reference(
        tiny_lm, lora=LoraSettings(4, 8, None, seed=0), adapter_path=adapter, device="cpu"
    )
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trainable and all(".default." in name or name.startswith("value_head") for name in trainable)
    with reference.activated():
        reference_logprobs(reference)  # nested, as the evaluation does
        assert policy.model.active_adapter == "reference"
    with pytest.raises(KeyError), reference.activated():
        raise KeyError
    assert policy.model.active_adapter == "default"
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trainable
