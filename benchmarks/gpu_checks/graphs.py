"""Decoding by captured graphs: the plain loop's tokens, whatever happens to the model between two rollouts."""

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from benchmarks.gpu_checks.context import Context
from pipeline.data.prompts import PromptBatch
from pipeline.models.kernels import use_fast_kernels
from pipeline.models.loading import LoraSettings, add_lora
from pipeline.models.packing import pack
from pipeline.models.policy import Policy, Reference
from pipeline.rollout.decoding import DecodeGraphs
from pipeline.rollout.rollout import PolicyOutputs, Responses, policy_outputs, sample_responses
from pipeline.rollout.sampling import SamplingOptions
from pipeline.runtime.checkpoints import restore_trained

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
END = 0  # of a response


def gpt2(context: Context) -> None:
    """A GPT-2, all weights trained."""
    _check(context, _random(context, _gpt2_config(context)))


def lora(context: Context) -> None:
    """A GPT-2 with adapters, which is its own reference with them off."""
    model = add_lora(_random(context, _gpt2_config(context)), LoraSettings(8, 16, ["c_attn", "c_proj", "c_fc"], 0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, when the adapter changes nothing
                parameter.normal_(std=0.05)
    _check(context, model)


def grouped_query(context: Context) -> None:
    """A Llama with fewer key heads than query heads."""
    layers, width, vocabulary = context.sized((6, 512, 32000), (2, 32, 301))
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=2 * width, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=vocabulary, max_position_embeddings=128,
    )  # fmt: skip
    _check(context, _random(context, config))


def _gpt2_config(context: Context) -> GPT2Config:
    layers, width, vocabulary = context.sized((6, 512, 50257), (2, 32, 301))
    return GPT2Config(n_layer=layers, n_embd=width, n_head=8, vocab_size=vocabulary, n_positions=128)


def _random(context: Context, config: GPT2Config | LlamaConfig) -> nn.Module:
    """A model of random weights whose distributions are far from uniform."""
    config.eos_token_id = config.pad_token_id = END
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return use_fast_kernels(model, context.device)


class _Sampler:
    """One policy, sampled by graphs and by the plain loop from the same noise."""

    def __init__(self, context: Context, policy: Policy, graphs: DecodeGraphs):
        self.context, self.policy, self.graphs = context, policy, graphs
        # The last batch is smaller than the others.
        self.count, self.microbatch = context.sized((96, 40), (5, 2))
        self.prompt, self.response = context.sized((8, 24), (4, 6))

    def sample(self, precision: str, *, by_graph: bool, keep: bool = False) -> tuple[Responses, PolicyOutputs | None]:
        """Responses; with `keep` the policy's log-probs and values of them as well."""
        noise = torch.Generator().manual_seed(1)
        tokens = torch.randint(1, 300, (self.count, self.prompt), generator=noise)
        starts = torch.randint(0, self.prompt, (self.count, 1), generator=noise)
        prompts = PromptBatch(tokens, torch.arange(self.prompt) >= starts, [""] * self.count)
        uniforms = torch.rand(self.count, self.response, generator=noise)
        lengths = torch.randint(1, self.response + 1, (self.count,), generator=noise)
        with self._autocast(precision):
            return sample_responses(
                self.policy.model, prompts, uniforms, lengths, microbatch_size=self.microbatch, eos_token_id=END,
                pad_token_id=END, options=SamplingOptions(), value_head=self.policy.value_head if keep else None,
                graphs=self.graphs if by_graph else None,
            )  # fmt: skip

    def compare(self, precision: str, when: str, *, keep: bool = False) -> Tensor:
        """Require that both give the same tokens; gives them."""
        replayed, kept = self.sample(precision, by_graph=True, keep=keep)
        looped, _ = self.sample(precision, by_graph=False, keep=keep)
        same = torch.equal(replayed.response_tokens, looped.response_tokens)
        self.context.require(f"{precision}: the plain loop's tokens {when}", same)
        if keep:
            expected = policy_outputs(self.policy, looped, temperature=1.0, microbatch_size=self.microbatch)
            error = (kept.logprobs - expected.logprobs).abs().max().item()
            self.context.require_below("log-probs beside a forward's", error, 1e-4, where=f"{precision} {when}")
        return looped.response_tokens

    def compute_reference(self, reference: Reference, precision: str) -> None:
        """A forward of the reference; of an adapted model with its adapter off."""
        tokens = torch.randint(1, 300, (4, 12), device=self.context.device)
        with self._autocast(precision):
            reference.logprobs(pack(tokens, np.full((4, 2), 6), 6, reference.layout))

    def _autocast(self, precision: str) -> torch.autocast:
        dtype = DTYPES[precision]
        return torch.autocast(self.context.device, dtype or torch.bfloat16, enabled=dtype is not None)


def _check(context: Context, model: nn.Module) -> None:
    policy, reference = Policy(model).eval().to(context.device), Reference(model)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=3e-3, fused=True)
    start = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    capture = context.on_gpu("the capture of a graph and its replay; the plain loop stands for them")
    for precision in DTYPES:
        graphs = DecodeGraphs()
        sampler, keep = _Sampler(context, policy, graphs), precision == "no"
        first = sampler.compare(precision, "at first", keep=keep)
        _optimizer_step(policy, optimizer, context.device)
        second = sampler.compare(precision, "after an optimizer step", keep=keep)
        context.require(f"{precision}: the optimizer step changed the tokens", not torch.equal(first, second))
        restore_trained(policy, start)
        again = sampler.compare(precision, "after loading weights", keep=keep)
        context.require(f"{precision}: the loaded weights' tokens are the first's", torch.equal(first, again))
        sampler.compute_reference(reference, precision)
        sampler.compare(precision, "after the reference ran", keep=keep)
        other = "bf16" if precision == "no" else "no"
        sampler.compare(other, f"between two rollouts in {precision}")
        sampler.compare(precision, f"after a rollout in {other}", keep=keep)
        context.require(f"{precision}: no capture failed ({graphs.failure})", graphs.failure is None)
        if capture:
            context.require_below("bytes by which memory grows", _growth(sampler, precision), 2**20, where=precision)
    context.on_gpu("memory over five rollouts")


def _optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, device: str) -> None:
    tokens = torch.randint(1, 300, (8, 20), generator=torch.Generator().manual_seed(2)).to(device)
    packed = pack(tokens, np.full((8, 2), 10), 10, policy.layout)
    outputs = policy(packed, token_loss=lambda logprobs, _rows: -logprobs)
    (outputs.loss + outputs.values.square().sum()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _growth(sampler: _Sampler, precision: str) -> int:
    """By how many bytes the memory taken grows over five rollouts."""
    taken = []
    for _ in range(5):
        sampler.sample(precision, by_graph=True)
        torch.cuda.synchronize()
        taken.append(torch.cuda.memory_allocated())
    return max(taken) - taken[0]
