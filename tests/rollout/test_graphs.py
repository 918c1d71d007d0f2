"""CUDA graphs without CUDA: what they are kept by, and what is left behind where capturing one fails."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import random_causal_lm
from test_config import default_config

from pipeline.models.loading import LoraSettings, add_lora
from pipeline.phases import Phases
from pipeline.rollout import graphs as module
from pipeline.rollout.decoding import _Steps, decode
from pipeline.rollout.graphs import DecodeGraphs
from pipeline.rollout.sampling import SamplingOptions

PROMPTS = torch.tensor([[5, 6, 7, 8], [0, 0, 0, 9]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]]).bool()
LENGTH = 6


class Cuda:
    """Stands in for `torch.cuda`: a capture runs the step and puts nothing aside, a replay runs the step again."""

    def __init__(self):
        self.current = "main"
        self.captures, self.resets, self.modes = 0, 0, []
        self.fails_in_step = self.fails_at_end = None

    def use(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(module, "GRAPHED", "cpu")
        patch.setattr(torch.cuda, "current_stream", lambda: self.current)
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "current", stream))
        patch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda _other: None))
        patch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(reset=self.reset))
        patch.setattr(torch.cuda, "graph", self.graph)
        capture = module._capture

        def capture_and_replay(steps):
            self.main = SimpleNamespace(wait_stream=lambda _stream: None)
            self.current = self.main
            graph = capture(steps)
            graph.replay = steps.step
            return graph

        patch.setattr(module, "_capture", capture_and_replay)

    def reset(self):
        self.resets += 1

    @contextmanager
    def graph(self, _graph, capture_error_mode):
        self.modes.append(capture_error_mode)
        self.captures += 1
        before, self.current = self.current, "capturing"
        try:
            if self.fails_in_step is not None:
                raise self.fails_in_step
            yield
        finally:
            if self.fails_at_end is not None:  # and torch leaves its stream the current one
                raise self.fails_at_end
            self.current = before


@pytest.fixture
def cuda(monkeypatch):
    stand_in = Cuda()
    stand_in.use(monkeypatch)
    return stand_in


@pytest.fixture(scope="module")
def gpt2(tokenizer):
    return random_causal_lm("gpt2", tokenizer)


def sample(model, graphs=None, *, rows=slice(None), seed=0, value_head=None, **options):
    uniforms = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(seed))[rows]
    decoded = decode(
        model, PROMPTS[rows], MASK[rows], uniforms, torch.full((len(uniforms),), LENGTH), eos_token_id=99,
        pad_token_id=98, options=SamplingOptions(**options), value_head=value_head, graphs=graphs,
    )  # fmt: skip
    return decoded.tokens


def test_a_graph_is_captured_once_and_gives_the_loops_tokens_in_each_rollout(cuda, gpt2):
    graphs = DecodeGraphs()
    for seed in range(3):
        assert torch.equal(sample(gpt2, graphs, seed=seed), sample(gpt2, seed=seed))
    assert cuda.captures == 1 and graphs.failure is None
    assert cuda.modes == ["thread_local"], "another thread may use the GPU meanwhile"


def test_each_shape_precision_adapter_value_head_and_model_has_a_graph_of_its_own(cuda, gpt2, tokenizer):
    graphs = DecodeGraphs()
    lora = add_lora(random_causal_lm("gpt2", tokenizer, seed=1), LoraSettings(2, 4, None, 0))
    other = random_causal_lm("gpt2", tokenizer, seed=2)
    heads = [torch.nn.Linear(32, 1), torch.nn.Linear(32, 1)]

    def bfloat16(*arguments, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return sample(*arguments, **options)

    def unadapted():
        with lora.disable_adapter():
            return sample(lora, graphs)

    uses = [
        lambda: sample(gpt2, graphs),
        lambda: sample(gpt2, graphs, rows=slice(1)),
        lambda: sample(gpt2, graphs, temperature=0.5),
        lambda: bfloat16(gpt2, graphs),
        lambda: sample(gpt2, graphs, value_head=heads[0]),
        lambda: sample(gpt2, graphs, value_head=heads[1]),
        lambda: sample(other, graphs),
        lambda: sample(lora, graphs),
        unadapted,
    ]
    first = [use() for use in uses]
    assert cuda.captures == len(uses)
    assert all(torch.equal(use(), tokens) for use, tokens in zip(uses, first, strict=True))
    assert cuda.captures == len(uses) and graphs.failure is None


def test_autocast_keeps_no_casts_while_a_graph_is_captured(cuda, gpt2, monkeypatch):
    step, kept = _Steps.step, []

    def watched(self):
        kept.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        step(self)

    monkeypatch.setattr(_Steps, "step", watched)
    with torch.autocast("cpu", torch.bfloat16):
        sample(gpt2, DecodeGraphs())
    assert kept[:3] == [(True, False)] * 3, "two steps of warm-up and the capture"
    assert kept[3:] == [(True, True)] * (LENGTH - 1)


@pytest.mark.parametrize("at_end", (None, RuntimeError("capture invalidated")))
def test_running_out_of_memory_in_a_capture_frees_the_graphs_and_names_the_setting(cuda, gpt2, at_end):
    graphs = DecodeGraphs()
    sample(gpt2, graphs)
    cuda.fails_in_step, cuda.fails_at_end = torch.OutOfMemoryError("CUDA out of memory."), at_end
    config = default_config(rollout_microbatch_size=7)
    phases = Phases(config, torch.device("cpu"))
    with pytest.raises(MemoryError, match="lower rollout_microbatch_size=7"), phases.timed("sample"):
        sample(gpt2, graphs, rows=slice(1))
    assert not graphs._entries and cuda.resets == 1 and cuda.current is cuda.main


def test_what_cannot_be_captured_is_said_once_and_decoded_by_the_loop_from_then_on(cuda, gpt2):
    graphs = DecodeGraphs()
    cuda.fails_in_step = RuntimeError("operation not permitted when stream is capturing\nsecond line")
    cuda.fails_at_end = RuntimeError("capture invalidated")
    with pytest.warns(UserWarning, match="without a CUDA graph, more slowly: operation not permitted") as told:
        for seed in range(3):
            assert torch.equal(sample(gpt2, graphs, seed=seed), sample(gpt2, seed=seed))
    assert len(told) == 1 and cuda.captures == 1
    assert graphs.failure == "operation not permitted when stream is capturing"
    assert cuda.current is cuda.main, "the stream of the failed capture is not left the current one"
    assert not graphs._entries and cuda.resets == 1


def test_weights_that_have_moved_are_not_read_where_they_were(cuda, tokenizer):
    model = random_causal_lm("gpt2", tokenizer)
    graphs = DecodeGraphs()
    sample(model, graphs)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    assert torch.equal(sample(model, graphs), sample(model)) and graphs.failure is None, "updated in place"
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    with pytest.warns(UserWarning, match="the weights have moved"):
        assert torch.equal(sample(model, graphs), sample(model))


def test_a_reason_known_beforehand_is_never_tried(cuda, gpt2):
    with pytest.warns(UserWarning, match="zero3 moves the weights about"):
        sample(gpt2, DecodeGraphs("zero3 moves the weights about"))
    assert cuda.captures == 0
