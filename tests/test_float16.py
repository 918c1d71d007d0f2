"""float16 as on a GPU: the loss is scaled, gradients are measured unscaled, and what overflows takes no step."""

# ruff: noqa: F401, F811 - fixtures of test_update

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from test_update import TEMPERATURE, advantages, flat, fresh_policy, rollout, settings

from pipeline.models.policy import Policy
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.engine import EngineError
from pipeline.update import update_policy


@pytest.fixture
def in_float16():
    """Makes a process alone compute in float16, as Accelerate does on a GPU: autocast, and a scale that is found."""

    def make(scale: float) -> Accelerator:
        accelerator = Accelerator(cpu=True, mixed_precision="fp16")  # which does nothing on a CPU
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    for state in (PartialState, AcceleratorState):
        state._reset_state()
    yield make
    for state in (PartialState, AcceleratorState):
        state._reset_state()


def adam(policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.parameters(), lr=123.0, fused=True, weight_decay=0.0)


def test_in_float16_the_update_follows_that_in_float32(tokenizer, rollout, advantages, in_float16):
    results = []
    for scale in (None, 2.0**10):
        accelerator = Accelerator(cpu=True) if scale is None else in_float16(scale)
        policy = fresh_policy(tokenizer)
        engine, optimizer = accelerator.prepare(policy, adam(policy))
        stats = update_policy(accelerator, engine, optimizer, rollout, advantages, settings(learning_rate=1e-3),
                              step=0, seed=0, temperature=TEMPERATURE, layout=policy.layout)  # fmt: skip
        results.append((flat(policy) - flat(fresh_policy(tokenizer)), stats))
        for state in (PartialState, AcceleratorState):
            state._reset_state()
    (moved_32, stats_32), (moved_16, stats_16) = results
    assert torch.cosine_similarity(moved_16, moved_32, dim=0) > 0.99
    assert stats_16.gradient_norm == pytest.approx(stats_32.gradient_norm, rel=1e-2), "unscaled before it is measured"
    assert 0 < stats_16.first_minibatch_ratio_deviation < 0.1 and len(stats_16.applied) == 4


@pytest.mark.parametrize("kind", ["sgd", "fused adam"])
def test_in_float16_an_overflow_takes_no_step_and_halves_the_scale_until_it_fits(
    tokenizer, rollout, advantages, in_float16, kind
):
    accelerator = in_float16(2.0**24)
    policy = fresh_policy(tokenizer)
    optimizer = torch.optim.SGD(policy.parameters(), lr=123.0) if kind == "sgd" else adam(policy)
    engine, optimizer = accelerator.prepare(policy, optimizer)

    def update(epochs: int):
        return update_policy(accelerator, engine, optimizer, rollout, advantages, settings(ppo_epochs=epochs),
                             step=0, seed=0, temperature=TEMPERATURE, layout=policy.layout)  # fmt: skip

    stats = update(1)
    assert accelerator.scaler.get_scale() == 2.0**22 and torch.equal(flat(policy), flat(fresh_policy(tokenizer)))
    assert stats.applied == (True, True), "finding the scale is no fault"
    assert all(state.get("step", 0) == 0 for state in optimizer.optimizer.state.values())
    assert not hasattr(optimizer.optimizer, "found_inf"), "or the next step would be skipped as well"
    update(8)
    assert accelerator.scaler.get_scale() < 2.0**22
    assert flat(policy).isfinite().all() and not torch.equal(flat(policy), flat(fresh_policy(tokenizer)))


def test_on_a_cpu_float16_is_refused_where_accelerate_would_compute_in_float32(in_float16):
    with pytest.raises(EngineError, match="mixed_precision='fp16' needs a GPU; on a CPU use bf16 or no"):
        make_accelerator("fp16")
