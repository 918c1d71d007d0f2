"""Times of single operations of a step, each by itself."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, GPT2Config

from benchmarks.gpu_checks.context import Context
from benchmarks.gpu_checks.runs import trainer_in_hand
from benchmarks.gpu_checks.timing import median_seconds, seconds
from pipeline.data.prompts import PromptBatch
from pipeline.models.kernels import use_fast_kernels
from pipeline.models.packing import Layout, pack
from pipeline.rollout.decoding import DecodeGraphs
from pipeline.rollout.rollout import sample_responses
from pipeline.rollout.sampling import SamplingOptions
from pipeline.rollout.sizing import bytes_per_sequence


def decoding(context: Context) -> None:
    """Microseconds for each token of a batch: by graph, by the plain loop, by transformers' `generate`."""
    batch, prompt, response = context.sized((256, 8, 16), (4, 4, 4))
    shape = context.sized({}, {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 301})
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(GPT2Config(**shape, pad_token_id=0), attn_implementation="sdpa").eval()
    model = use_fast_kernels(copy.deepcopy(plain), context.device).to(context.device)
    plain = plain.to(context.device, torch.bfloat16)
    tokens = torch.randint(1, 300, (batch, prompt), device=context.device)
    prompts = PromptBatch(tokens, torch.ones_like(tokens).bool(), [""] * batch)
    uniforms, lengths = torch.rand(batch, response), torch.full((batch,), response)
    graphs = DecodeGraphs()

    def decode(graphs: DecodeGraphs | None) -> None:
        with torch.autocast(context.device, torch.bfloat16):
            sample_responses(
                model, prompts, uniforms, lengths, microbatch_size=batch, eos_token_id=-1, pad_token_id=0,
                options=SamplingOptions(), graphs=graphs,
            )  # fmt: skip

    def generate() -> None:
        plain.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0, max_new_tokens=response,
            min_new_tokens=response,
        )  # fmt: skip

    repeats = context.sized(10, 1)
    for name, action in (("graph", lambda: decode(graphs)), ("loop", lambda: decode(None)), ("generate", generate)):
        spent = median_seconds(context.device, action, repeats)
        context.measure(**{f"microseconds per token, {name}": 1e6 * spent / response})
    context.require(f"no capture failed ({graphs.failure})", graphs.failure is None)
    context.on_gpu("the graph's time: the plain loop stands for it")


def attention(context: Context) -> None:
    """Milliseconds of attention over packed rows, forward and backward, on shapes met first and again."""
    heads, size, samples = context.sized((12, 64, 16), (2, 8, 4))
    widths = context.sized((181, 190, 203, 211, 222), (19, 23))
    ways: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
        backend.name: lambda q, k, v, width, backend=backend: _by_mask(backend, q, k, v, width)
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    }
    ways["VARLEN"] = _by_lengths
    done = 0
    for name, way in ways.items():
        first, again = [], []
        try:
            for width in widths:
                query, key, value = (
                    torch.randn(samples, width, heads, size, device=context.device, dtype=torch.bfloat16,
                                requires_grad=True) for _ in range(3)
                )  # fmt: skip

                def step(inputs=(query, key, value), way=way, width=width) -> None:
                    way(*inputs, width).sum().backward()

                first.append(seconds(context.device, step))
                again.append(median_seconds(context.device, step, context.sized(10, 1)))
        except RuntimeError as error:  # not on this device, or not with a mask
            context.measure(**{name: f"cannot: {str(error).splitlines()[0][:120]}"})
            continue
        done += 1
        context.measure(**{f"{name}, ms": {"first": [1e3 * s for s in first], "again": [1e3 * s for s in again]}})
    context.require("the efficient kernels or the products run", done > 0)
    context.on_gpu("cuDNN's, the memory-efficient and the variable-length kernels")


def _by_mask(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, width: int) -> Tensor:
    """Four samples a row, told apart by a mask: (rows, width, heads, size) -> (rows, heads, width, size)."""
    segments = torch.arange(width, device=query.device) * 4 // width
    mask = (segments.unsqueeze(1) == segments).tril()[None, None]
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask)


def _by_lengths(query: Tensor, key: Tensor, value: Tensor, width: int) -> Tensor:
    """The same samples told apart by where each begins: (tokens, heads, size)."""
    starts = [row * width + -(-sample * width // 4) for row in range(len(query)) for sample in range(4)]
    starts = torch.tensor([*starts, query.shape[0] * width], dtype=torch.int32, device=query.device)
    flat = (x.flatten(0, 1) for x in (query, key, value))
    longest = -(-width // 4)
    return varlen_attn(*flat, starts, starts, longest, longest, window_size=(-1, 0))


def head_columns(context: Context) -> None:
    """Milliseconds of the head's three products with GPT-2's odd vocabulary and one padded to a multiple of 256."""
    tokens, width = context.sized((2000, 768), (8, 16))
    hidden = torch.randn(tokens, width, device=context.device, dtype=torch.bfloat16)
    for columns in context.sized((50257, 50432), (301, 512)):
        weight = torch.randn(columns, width, device=context.device, dtype=torch.bfloat16)
        logits = linear(hidden, weight)
        products = {
            "logits": lambda weight=weight: linear(hidden, weight),
            "gradient of states": lambda weight=weight, logits=logits: linear(logits, weight.T),
            "gradient of weight": lambda logits=logits: logits.T @ hidden,
        }
        spent = {
            name: median_seconds(context.device, action, context.sized(20, 1)) for name, action in products.items()
        }
        context.measure(**{f"milliseconds, {columns} columns": {name: 1e3 * s for name, s in spent.items()}})


def packing(context: Context) -> None:
    """Milliseconds to lay samples out in rows, on the host for the most part."""
    layout, random = Layout(True, 2**31, True), np.random.default_rng(0)
    for count in context.sized((16, 256, 512), (4, 16)):
        lengths = np.stack([random.integers(2, 9, count), random.integers(4, 17, count)], 1)
        tokens = torch.randint(1, 300, (count, 24), device=context.device)
        spent = median_seconds(context.device, lambda t=tokens, n=lengths: pack(t, n, 16, layout), context.sized(20, 3))
        context.measure(**{f"milliseconds, {count} samples": 1e3 * spent})


def largest_microbatch(context: Context) -> None:
    """As many long sequences at a time as memory is said to allow: whether they fit, and what they took."""
    from benchmarks.gpu_checks.speed import recipe_shapes  # which imports this module

    response = context.sized(504, 6)
    settings = recipe_shapes(context) | {
        "rollout_batch_size": context.sized(4096, 8), "rollout_microbatch_size": "null",
        "response_min_tokens": response, "response_max_tokens": response,
    }  # fmt: skip
    with trainer_in_hand(context, **settings) as trainer:
        chosen = trainer.config.rollout.rollout_microbatch_size
        tokens = trainer.config.data.prompt_max_tokens + response
        estimate = chosen * bytes_per_sequence(trainer.policy.config, tokens, 2)
        context.measure(sequences_at_a_time=chosen, estimated_gigabytes=estimate / 1e9)
        on_gpu = context.on_gpu("the peak of the GPU's memory")
        before = 0
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            responses, _outputs = trainer.sample(0, trainer.draw_prompts(0).slice(0, chosen))
            trainer.read(responses)
            fits = True
        except (torch.OutOfMemoryError, MemoryError):
            fits = False
        context.require(f"{chosen} sequences of {tokens} tokens fit", fits)
        if on_gpu and fits:
            taken = torch.cuda.max_memory_allocated() - before
            context.measure(peak_gigabytes=taken / 1e9, graphs_failed=trainer.graphs.failure)
            context.require_below("peak over estimate", taken / estimate, 2.0)
