"""The pipeline's own arithmetic on the device against float64 on the CPU."""

import contextlib
import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from benchmarks.gpu_checks.context import Context
from pipeline.models import head as chunked
from pipeline.models import kernels
from pipeline.models.forward import position_ids
from pipeline.models.packing import pack
from pipeline.models.policy import Policy
from pipeline.rollout import sampling

LIMITS = {"no": 1e-5, "bf16": 2e-2}  # of the relative error, by precision
TEMPERATURE = 0.7


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64 on the CPU."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def precisions(context: Context) -> Iterator[tuple[str, float, contextlib.AbstractContextManager]]:
    """Each precision, its limit and its autocast."""
    for name, limit in LIMITS.items():
        yield name, limit, torch.autocast(context.device, torch.bfloat16, enabled=name == "bf16")


def random_gpt2(context: Context) -> nn.Module:
    """A GPT-2 of random weights whose vocabulary is odd, as GPT-2's is."""
    torch.manual_seed(0)
    layers, width, heads, vocabulary = context.sized((4, 256, 8, 50257), (2, 32, 4, 301))
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocabulary, "n_positions": 128}
    return AutoModelForCausalLM.from_config(GPT2Config(**shape, pad_token_id=0), attn_implementation="sdpa").eval()


def _head_case(context: Context) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """On the CPU: a head, hidden states (T, H), targets (T,) and a positive weight of each token's loss (T,)."""
    tokens, width, vocabulary = context.sized((700, 768, 50257), (13, 32, 301))  # more than one chunk on a GPU
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False)
    return head, torch.randn(tokens, width), torch.randint(vocabulary, (tokens,)), torch.rand(tokens) + 0.5


def head_loss(context: Context) -> None:
    """The loss's log-probs, and its gradient with respect to states and weight."""
    head, hidden, targets, weights = _head_case(context)
    exact, states = copy.deepcopy(head).double(), hidden.double().requires_grad_()
    logprobs = (exact(states) / TEMPERATURE).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    (0.5 * (weights * logprobs.square()).sum()).backward()
    expected = {"log-probs": logprobs, "gradient of states": states.grad, "gradient of weight": exact.weight.grad}
    head, weights, targets = head.to(context.device), weights.to(context.device), targets.to(context.device)
    for precision, limit, autocast in precisions(context):
        head.zero_grad()
        leaf = hidden.to(context.device, copy=True).requires_grad_()
        with autocast:
            loss, found = chunked.head_loss(
                head, leaf, targets, lambda lp, rows: weights[rows] * lp.square(), TEMPERATURE, scale=0.5
            )
        loss.backward()
        results = (found, leaf.grad, head.weight.grad)
        for (name, right), result in zip(expected.items(), results, strict=True):
            context.require_below(name, relative_error(result, right), limit, where=precision)


def head_logprobs(context: Context) -> None:
    """Log-probs and entropy from hidden states."""
    head, hidden, targets, _weights = _head_case(context)
    table = (copy.deepcopy(head).double()(hidden.double()) / TEMPERATURE).log_softmax(-1)
    head = head.to(context.device)
    for precision, limit, autocast in precisions(context):
        with autocast:
            logprobs, entropy = chunked.head_logprobs(
                head, hidden.to(context.device), targets.to(context.device), TEMPERATURE, with_entropy=True
            )
        _require_table(context, precision, limit, table, targets, logprobs, entropy)


def logits_logprobs(context: Context) -> None:
    """Log-probs and entropy from logits, those of float32 and those of bfloat16."""
    head, hidden, targets, _weights = _head_case(context)
    logits = head(hidden).detach()
    table = (logits.double() / TEMPERATURE).log_softmax(-1)
    for precision, limit in LIMITS.items():
        given = logits.to(context.device, torch.bfloat16 if precision == "bf16" else torch.float32)
        found = chunked.logits_logprobs(given, targets.to(context.device), TEMPERATURE, with_entropy=True)
        _require_table(context, precision, limit, table, targets, *found)


def _require_table(
    context: Context, precision: str, limit: float, table: Tensor, targets: Tensor, logprobs: Tensor, entropy: Tensor
) -> None:
    chosen = table.gather(1, targets.unsqueeze(1)).squeeze(1)
    context.require_below("log-probs", relative_error(logprobs, chosen), limit, where=precision)
    context.require_below("entropy", relative_error(entropy, -(table.exp() * table).sum(-1)), limit, where=precision)


def inverse_cdf(context: Context) -> None:
    """The tokens a CPU draws from the same probabilities, but where a uniform is within rounding of a boundary.

    Of 50,257 tokens several thousand are likelier than float32's rounding of a sum: some uniforms in a thousand are so
    near a boundary that a sum in another order puts them on its other side.
    """
    torch.manual_seed(0)
    rows, vocabulary = context.sized((500, 50257), (100, 1031))
    draws, different, wrong = 0, 0, 0
    for _ in range(20):
        probabilities = (4 * torch.randn(rows, vocabulary)).softmax(-1)
        uniforms = torch.rand(rows)
        found = sampling.inverse_cdf(probabilities.to(context.device), uniforms.to(context.device)).cpu()
        different += (found != sampling.inverse_cdf(probabilities, uniforms)).sum().item()
        exact = probabilities.double().cumsum(-1)
        after = exact.gather(1, found.unsqueeze(1)).squeeze(1)
        before = after - probabilities.double().gather(1, found.unsqueeze(1)).squeeze(1)
        target = uniforms.double() * exact[:, -1]
        wrong += ((target < before - 1e-6) | (target > after + 1e-6)).sum().item()
        draws += rows
    context.measure(draws=draws, tokens_unlike_the_cpus=different)
    context.require("no token is off by more than a rounding of the uniform", wrong == 0)
    context.require("at most 1 % of the tokens are not the CPU's", different <= draws // 100)


def _padded_batch(context: Context) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) and their mask, left-padded, on the CPU."""
    torch.manual_seed(1)
    batch, width = context.sized((32, 48), (3, 9))
    lengths = torch.randint(1, width + 1, (batch,))
    return torch.randint(1, 300, (batch, width)), torch.arange(width) >= (width - lengths).unsqueeze(1)


def _logits(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits (T, V) at the real positions."""
    device = next(model.parameters()).device
    tokens, mask = tokens.to(device), mask.to(device)
    return model(tokens, attention_mask=mask.long(), position_ids=position_ids(mask)).logits[mask]


def fast_kernels(context: Context) -> None:
    """A model's logits and its embedding's gradient after `use_fast_kernels`."""
    model, (tokens, mask) = random_gpt2(context), _padded_batch(context)
    exact = copy.deepcopy(model).double()
    expected = _logits(exact, tokens, mask)
    expected.square().mean().backward()
    model = kernels.use_fast_kernels(model, context.device).to(context.device)
    for precision, limit, autocast in precisions(context):
        model.zero_grad()
        with autocast:
            found = _logits(model, tokens, mask)
        found.float().square().mean().backward()
        context.require_below("logits", relative_error(found, expected), limit, where=precision)
        gradients = (m.get_input_embeddings().weight.grad for m in (model, exact))
        context.require_below("gradient of embedding", relative_error(*gradients), limit, where=precision)


@torch.no_grad()
def many_forwards(context: Context) -> None:
    """Logits inside `many_forwards`, which keeps lowered weights, before and after the weights change."""
    model, (tokens, mask) = random_gpt2(context), _padded_batch(context)
    exact = copy.deepcopy(model).double()
    model = kernels.use_fast_kernels(model, context.device).to(context.device)
    for precision, limit, autocast in precisions(context):
        for weights in ("first", "changed"):
            with autocast, kernels.many_forwards(model, keep=True):
                found = _logits(model, tokens, mask)
            error = relative_error(found, _logits(exact, tokens, mask))
            context.require_below("logits", error, limit, where=f"{precision}, {weights} weights")
            for one in (model, exact):
                for parameter in one.parameters():
                    parameter.mul_(1.1)


def packed_as_alone(context: Context) -> None:
    """Samples packed into rows and each alone: the same log-probs and values, and float64's."""
    model, device = random_gpt2(context), context.device
    torch.manual_seed(2)
    count, prompt, response = context.sized((24, 8, 24), (4, 3, 5))
    lengths = np.stack([np.random.default_rng(0).integers(1, w + 1, count) for w in (prompt, response)], 1)
    tokens = torch.randint(1, 300, (count, prompt + response))
    exact = Policy(copy.deepcopy(model)).eval()
    nn.init.normal_(exact.value_head.weight)
    policy = Policy(kernels.use_fast_kernels(model, device)).eval()
    policy.value_head.load_state_dict(exact.value_head.state_dict())
    policy.to(device)
    exact.double()

    @torch.no_grad()
    def read(policy: Policy, samples: list[slice], device: str) -> tuple[Tensor, Tensor]:
        outputs = [policy(pack(tokens[s].to(device), lengths[s], response, policy.layout)) for s in samples]
        return torch.cat([o.logprobs for o in outputs]), torch.cat([o.values for o in outputs])

    alone, together = [slice(i, i + 1) for i in range(count)], [slice(0, count)]
    expected = read(exact, alone, "cpu")
    for precision, limit, autocast in precisions(context):
        for name, samples in (("packed", together), ("alone", alone)):
            with autocast:
                found = read(policy, samples, device)
            for what, one, right in zip(("log-probs", "values"), found, expected, strict=True):
                context.require_below(what, relative_error(one, right), limit, where=f"{precision}, {name}")
