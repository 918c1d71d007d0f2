"""Trainings on a fake CUDA device (`fake_device`): the code that a GPU would run, on a machine without one.

Two steps of the real trainer, and the evaluation: Accelerate's placement, sampling with its captured graph, the
reward's thread, the reference, gather, advantages, the update with backward and optimizer, metrics. In float32 the
metrics must equal the CPU's. Not shown here: a GPU's rounding, times, memory, and races between streams.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from fake_device import fake_cuda
from ledger import Ledger

from pipeline.assembly import build_parts, open_data, parse_config
from pipeline.evaluation import evaluate
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.signals import StopRequest
from pipeline.trainer import PPOTrainer

STEPS, EPOCHS, MINIBATCHES, MICROBATCHES, ROLLOUT_MICROBATCHES = 2, 1, 2, 2, 2
SETTINGS = [
    "--steps", f"{STEPS}", "--rollout_batch_size", "8", "--rollout_microbatch_size", "4", "--minibatch_size", "4",
    "--microbatch_size", "2", "--ppo_epochs", f"{EPOCHS}", "--kl_early_stop", "1e9",
]  # fmt: skip
MODELS = {
    "gpt2": ("tiny_lm", []),
    "gpt2_lora": ("tiny_lm", ["--use_peft", "true", "--lora_r", "4"]),
    "llama_grouped": ("untied_lm", []),
}
PRECISIONS = ("no", "bf16")
CASES = [pytest.param(model, precision, id=f"{model}-{precision}") for model in MODELS for precision in PRECISIONS]
CASES.append(pytest.param("gpt2", "fp16", id="gpt2-fp16"))  # refused on a CPU

# How often the host may wait for the device in one step, by the trainer's methods: counted, each with its reason.
WAITS = {
    # Prompts, mask, noise and lengths are copied from pageable memory; every eighth token: have all samples ended?
    "sample": 5 * ROLLOUT_MICROBATCHES,
    "read": 1,  # lengths, from which rows are planned
    "gather": 5,  # copies of scores and weights; in bfloat16 also of lengths and an order, and the clock
    "update": 1 + EPOCHS + 3,  # lengths; an epoch's KL for the early stop; at the end means, largest ratios, norms
    "metrics": 4,  # all metrics in one copy, the critic's fit by a mask (two), the number of tokens
    "report": 6,  # tokens, masks, scores and KL of the samples shown
    "thread": 7,  # tokens and masks for the texts; inputs, mask and logits of the reward model's one batch
    "train": 5,  # the phases' clock
}


@dataclass
class Run:
    ledger: Ledger
    device: torch.device  # as Accelerate gave it
    trainer: PPOTrainer
    metrics: list[dict[str, float]]  # of each step
    evaluation: dict[str, object] | None  # its figures, in float32


@pytest.fixture(scope="module")
def on_cuda(request, tiny_recipe):
    """Train one case on the fake device, once for all tests."""

    @cache
    def run(model: str, precision: str) -> Run:
        with fake_cuda() as ledger:
            return train(tiny_recipe, settings_of(model, request), precision, ledger)

    return run


def settings_of(model: str, request) -> list[str]:
    fixture, settings = MODELS[model]
    return ["--model_path", request.getfixturevalue(fixture), *SETTINGS, *settings]


def train(recipe: str, settings: list[str], precision: str, ledger: Ledger) -> Run:
    """Do what pipeline.train does, except for its files."""
    PartialState._reset_state()
    AcceleratorState._reset_state()
    try:
        config = parse_config("", ["--config", recipe, *settings])
        accelerator = make_accelerator(precision)
        device = accelerator.device
        data = open_data(config)
        parts = build_parts(config, data, device)
        trainer = PPOTrainer(accelerator, parts.policy, parts.reference, parts.reward, data.tokenizer, data.training,
                             config, StopRequest())  # fmt: skip
        for name in ("sample", "start_scoring", "read", "score", "gather", "advantages", "update", "metrics", "report"):
            setattr(trainer, name, booked(ledger, name, getattr(trainer, name)))
        metrics = []

        def report(step):
            metrics.append(step.metrics)
            if step.step < STEPS:
                ledger.clear()  # the last step is like all later ones

        with ledger.under("train"):
            trainer.train(report, lambda: None, pytest.fail)
        evaluation = None
        if precision == "no":
            with ledger.under("evaluation"):
                evaluation = evaluate(
                    accelerator, parts.policy, parts.reference, parts.reward, data.tokenizer, data.held_out, config
                ).figures
    finally:
        PartialState._reset_state()
        AcceleratorState._reset_state()
    return Run(ledger, device, trainer, metrics, evaluation)


def booked(ledger, name, method):
    def call(*args, **kwargs):
        with ledger.under(name):
            return method(*args, **kwargs)

    return call


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith(("time/", "memory/", "throughput/"))}


@pytest.mark.parametrize(("model", "precision"), CASES)
def test_a_training_runs_on_cuda_and_its_first_ratio_is_one(on_cuda, model, precision):
    run = on_cuda(model, precision)
    assert {parameter.device.type for parameter in run.trainer.policy.parameters()} == {"cuda"}
    for metrics in run.metrics:
        assert torch.tensor(list(metrics.values())).isfinite().all(), metrics
        assert metrics["ppo/first_minibatch_ratio_deviation"] < 1e-4
        assert metrics["ppo/optimizer_steps"] == EPOCHS * MINIBATCHES
    assert run.metrics[1]["ppo/learning_rate"] > 0 and run.metrics[1]["kl/sequence_k3"] > 1e-4  # it has learned


@pytest.mark.parametrize("model", MODELS)
def test_in_float32_the_figures_are_those_of_the_cpu(on_cuda, tiny_recipe, request, model):
    here, there = on_cuda(model, "no"), train(tiny_recipe, settings_of(model, request), "no", Ledger())
    for ours, theirs in zip(here.metrics, there.metrics, strict=True):
        assert timeless(ours) == pytest.approx(timeless(theirs), rel=1e-3, abs=1e-4)
    for name in ("kl", "before", "after"):
        assert numbers(here.evaluation[name]) == pytest.approx(numbers(there.evaluation[name]), rel=1e-3, abs=1e-4)


def numbers(figures) -> list[float]:
    """All numbers in nested dictionaries and lists, in their order."""
    if isinstance(figures, dict | list):
        return [x for y in (figures.values() if isinstance(figures, dict) else figures) for x in numbers(y)]
    return [figures]


@pytest.mark.parametrize(("model", "precision"), CASES)
def test_a_token_is_made_by_a_graph_in_which_nothing_is_asked_of_the_host(on_cuda, model, precision):
    run = on_cuda(model, precision)
    assert run.trainer.graphs.failure is None  # else what could not be captured
    training, *evaluation = run.ledger.graphs  # the training has one shape, and keeps its graph
    assert training.replays >= STEPS * ROLLOUT_MICROBATCHES * 7  # all tokens but the first, of responses of up to ten
    assert all(graph.replays for graph in evaluation) and (evaluation or precision != "no")


@pytest.mark.parametrize(("model", "precision"), CASES)
def test_the_minibatch_loop_sends_two_copies_a_microbatch_and_waits_for_nothing(on_cuda, model, precision):
    ledger = on_cuda(model, precision).ledger
    copies, waits = of(ledger.copies, "update"), of(ledger.waits, "update")
    assert len(copies) == 2 * EPOCHS * MINIBATCHES * MICROBATCHES, "\n".join(copies)  # which samples; where in the rows
    assert len(waits) <= WAITS["update"], "\n".join(waits)  # one a minibatch would add EPOCHS * MINIBATCHES


@pytest.mark.parametrize(("model", "precision"), CASES)
def test_a_step_waits_for_the_device_no_more_often_than_it_must(on_cuda, model, precision):
    ledger = on_cuda(model, precision).ledger
    for label, most in WAITS.items():
        waits = of(ledger.waits, label)
        assert len(waits) <= most, "\n".join(waits)


def of(entries: list[str], label: str) -> list[str]:
    return [entry for entry in entries if entry.startswith(f"{label}:")]


@pytest.mark.parametrize(("model", "precision"), CASES)
def test_the_reward_is_computed_on_the_device_in_a_thread_beside_the_reference(on_cuda, model, precision):
    run = on_cuda(model, precision)
    assert run.device == torch.device("cuda")  # without an index, as a single process gets it
    assert run.ledger.launches["thread"] > 0 and run.ledger.launches["score"] == 0
