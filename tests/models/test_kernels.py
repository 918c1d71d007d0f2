"""Faster kernels say what the modules as loaded say, to rounding, and leave the model as it was."""

import pytest
import torch
from conftest import SHAPES, random_causal_lm
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from pipeline.models.kernels import (
    _KEPT,
    CPU_ATTENTION,
    _cuda_product,
    cpu_attention,
    many_forwards,
    use_fast_kernels,
)
from pipeline.models.loading import LoraSettings, add_lora

TOKENS = torch.arange(1, 15).view(2, 7)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("precision", (torch.float32, torch.bfloat16))
def test_a_model_with_fast_kernels_says_the_same_and_has_the_same_gradients(architecture, precision, tokenizer):
    tolerance = 1e-4 if precision == torch.float32 else 0.3
    found = []
    for fast in (False, True):
        model = random_causal_lm(architecture, tokenizer, scale=2.0)
        if fast:
            model = use_fast_kernels(model, "cpu")
            assert model.config._attn_implementation == CPU_ATTENTION
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32):
            logits = model(TOKENS, attention_mask=MASK).logits[MASK.bool()]
        logits.float().square().mean().backward()
        found.append((logits.float().detach(), model.get_input_embeddings().weight.grad))
    (plain, plain_gradient), (fast, fast_gradient) = found
    close(fast, plain, tolerance)
    assert (fast_gradient - plain_gradient).norm() <= tolerance * plain_gradient.norm()


def test_the_slow_activation_is_replaced_and_the_configuration_is_not(tokenizer):
    model = use_fast_kernels(random_causal_lm("gpt2", tokenizer), "cpu")
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    assert model.config.activation_function == "gelu_new"


def test_a_model_for_a_gpu_keeps_its_attention(tokenizer):
    assert use_fast_kernels(random_causal_lm("gpt2", tokenizer), "cuda").config._attn_implementation == "sdpa"


def test_a_classifier_that_looks_both_ways_says_the_same():
    config = AutoConfig.for_model("distilbert", vocab_size=50, dim=16, n_heads=2, n_layers=2, hidden_dim=32)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        plain = model(TOKENS, attention_mask=MASK).logits
        use_fast_kernels(model, "cpu")
        for enabled, tolerance in ((False, 1e-5), (True, 0.05)):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled), many_forwards(model):
                close(model(TOKENS, attention_mask=MASK).logits.float(), plain, tolerance)


@pytest.mark.parametrize("queries", (1, 5))
@pytest.mark.parametrize("heads", (2, 4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_attention_by_products_equals_the_formula(queries, heads, dtype):
    torch.manual_seed(0)
    query = torch.randn(3, 4, queries, 8).to(dtype)
    key, value = (torch.randn(3, heads, 6, 8).to(dtype) for _ in range(2))
    mask = (torch.rand(3, 1, queries, 6) < 0.6) | torch.eye(6, dtype=torch.bool)[:queries]
    module = nn.Module()
    module.num_key_value_groups = 4 // heads
    output, _ = cpu_attention(module, query, key, value, mask, scaling=0.3)
    wide = [x.double().repeat_interleave(4 // heads, 1) for x in (key, value)]
    scores = (0.3 * query.double() @ wide[0].transpose(2, 3)).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ wide[1]).transpose(1, 2)
    close(output.double(), expected, 1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("lora", (False, True))
@pytest.mark.parametrize("precision", (torch.float32, torch.bfloat16))
def test_many_forwards_say_the_same_and_see_new_weights_and_leave_no_trace(lora, precision, tokenizer):
    model = random_causal_lm("gpt2", tokenizer, scale=1.0)
    if lora:
        model = add_lora(model, LoraSettings(4, 8, None, seed=0))
    tolerance = 1e-4 if precision == torch.float32 else 0.1
    products = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32):
        for _ in range(2):
            plain = model(TOKENS).logits
            with many_forwards(model):
                assert all("forward" in vars(m) for m in products)
                close(model(TOKENS).logits, plain, tolerance)
            assert not any("forward" in vars(m) for m in products)
            for parameter in model.parameters():
                parameter.mul_(1.1)
        with pytest.raises(KeyError), many_forwards(model):
            raise KeyError
        assert not any("forward" in vars(m) for m in products)
        with many_forwards(model, few_rows=False):
            assert any("forward" in vars(m) for m in products) == (precision == torch.float32)


def test_lowered_copies_for_graphs_stay_where_they_are_whatever_precision_is_used_in_between():
    layer = nn.Linear(4, 3)
    rows = torch.ones(1, 4)

    def addresses(lowered):
        product = _cuda_product(layer, lowered, keep=True)
        close(product(rows).float(), layer(rows).detach(), 0.05)
        weight, bias = _KEPT[layer][lowered]
        return weight.data_ptr(), bias.data_ptr()

    first = addresses(torch.bfloat16)
    with torch.no_grad():
        layer.weight.add_(1.0)
    addresses(torch.float16)
    assert addresses(torch.bfloat16) == first
