"""The update on one process: on policy at first, the same for any microbatch size, as many steps as said."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from conftest import random_causal_lm

from pipeline.config import PPOSettings
from pipeline.models.forward import position_ids
from pipeline.models.head import token_logprobs
from pipeline.models.kernels import use_fast_kernels
from pipeline.models.policy import Policy
from pipeline.ppo.advantages import Advantages, compute_advantages
from pipeline.ppo.losses import ppo_loss
from pipeline.rollout.rollout import Responses, Rollout, policy_outputs
from pipeline.runtime.engine import autocast
from pipeline.runtime.randomness import generator
from pipeline.update import first_epoch_outputs, learning_rate_at, update_policy

COUNT, WIDTH, LENGTH, TEMPERATURE = 16, 3, 6, 0.9
ONE_STEP = {"ppo_epochs": 1, "minibatch_size": COUNT, "microbatch_size": 5, "max_grad_norm": 1e9}


def settings(**changes) -> PPOSettings:
    small = {
        "minibatch_size": 8,
        "microbatch_size": 3,
        "ppo_epochs": 2,
        "learning_rate": 1e-2,
        "learning_rate_schedule": "constant",
        "kl_early_stop": None,
        "steps": 10,
    }
    return PPOSettings(**(small | changes))


def fresh_policy(tokenizer) -> Policy:
    policy = Policy(random_causal_lm("gpt2", tokenizer)).eval()
    torch.manual_seed(2)
    torch.nn.init.normal_(policy.value_head.weight, std=0.1)
    return policy


def read(policy: Policy, samples: Responses) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and values (N, R) from the padded batch as it is, by plain autograd."""
    output = policy.model(
        samples.tokens,
        attention_mask=samples.mask.long(),
        position_ids=position_ids(samples.mask),
        output_hidden_states=True,
    )
    before = slice(samples.prompt_tokens.shape[1] - 1, -1)
    logprobs = token_logprobs(output.logits[:, before], samples.response_tokens, TEMPERATURE)
    return logprobs, policy.value_head(output.hidden_states[-1][:, before]).squeeze(-1)


@pytest.fixture(scope="module")
def rollout(tokenizer) -> Rollout:
    """Ragged random tokens with what the untrained policy says of them."""
    draw = torch.Generator().manual_seed(0)
    prompts, lengths = (torch.randint(1, n + 1, (COUNT, 1), generator=draw) for n in (WIDTH, LENGTH))
    tokens = torch.randint(len(tokenizer), (COUNT, WIDTH + LENGTH), generator=draw)
    responses = Responses(
        tokens[:, :WIDTH], torch.arange(WIDTH) >= WIDTH - prompts, tokens[:, WIDTH:], torch.arange(LENGTH) < lengths
    )
    outputs = policy_outputs(fresh_policy(tokenizer), responses, temperature=TEMPERATURE, microbatch_size=5)
    scores = torch.randn(COUNT, generator=draw)
    parts = scores[:, None]
    return Rollout(**vars(responses), **vars(outputs), ref_logprobs=outputs.logprobs, parts=parts, weighted=parts)


@pytest.fixture(scope="module")
def advantages(rollout) -> Advantages:
    return compute_advantages(rollout.scores, torch.zeros_like(rollout.logprobs), rollout.values, rollout.response_mask,
                              kl_coef=0.0, gamma=1.0, gae_lambda=0.95)  # fmt: skip


@pytest.fixture
def update(tokenizer, rollout, advantages):
    """Update a fresh policy by SGD (weights move by learning rate times gradient); return it and the statistics."""
    accelerator = Accelerator(cpu=True)

    def run(ppo: PPOSettings, *, step: int = 0, seed: int = 0):
        policy = fresh_policy(tokenizer)
        optimizer = torch.optim.SGD(policy.parameters(), lr=123.0)
        engine, optimizer = accelerator.prepare(policy, optimizer)
        stats = update_policy(accelerator, engine, optimizer, rollout, advantages, ppo,
                              step=step, seed=seed, temperature=TEMPERATURE, layout=policy.layout)  # fmt: skip
        return policy, stats

    return run


def flat(policy) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def moved(policy, tokenizer) -> float:
    """How far the weights are from the fresh policy's."""
    return (flat(policy) - flat(fresh_policy(tokenizer))).double().norm().item()


def test_the_first_minibatch_is_on_policy_and_the_later_ones_are_not(update):
    _, stats = update(settings())
    assert stats.first_minibatch_ratio_deviation < 1e-6
    assert stats.ratio_max > 1.001 and stats.approx_kl > 1e-5


def test_a_policy_that_is_not_the_one_that_sampled_shows_in_the_first_minibatch(update, tokenizer, rollout, advantages):
    policy = fresh_policy(tokenizer)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    stale = replace(rollout, logprobs=rollout.logprobs - 0.1)
    stats = update_policy(Accelerator(cpu=True), policy, optimizer, stale, advantages, settings(),
                          step=0, seed=0, temperature=TEMPERATURE, layout=policy.layout)  # fmt: skip
    assert stats.first_minibatch_ratio_deviation == pytest.approx(0.105171, abs=1e-4)  # exp(0.1) - 1


def test_steps_follow_the_gradient_of_the_mean_loss_over_all_tokens(update, tokenizer, rollout, advantages):
    ppo = settings(**ONE_STEP | {"ppo_epochs": 2})
    policy, stats = update(ppo)
    other, tokens = fresh_policy(tokenizer), rollout.response_mask.sum()
    losses, norms = [], []
    for _ in range(2):
        logprobs, values = read(other, rollout)
        real = rollout.response_mask
        loss = ppo_loss(
            logprobs[real],
            values[real],
            rollout.logprobs[real],
            rollout.values[real],
            advantages.advantages[real],
            advantages.returns[real],
            clip_range=ppo.clip_range,
            value_clip_range=ppo.value_clip_range,
            value_coef=ppo.value_coef,
        )
        gradients = torch.autograd.grad(loss.loss / tokens, list(other.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(other.parameters(), gradients, strict=True):
                parameter -= 1e-2 * gradient
        losses.append(loss)
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
    torch.testing.assert_close(flat(policy), flat(other), atol=2e-6, rtol=1e-5)
    assert stats.gradient_norm == pytest.approx(sum(norms) / 2, rel=1e-4)
    for name, figure in (("policy_loss", "policy_loss"), ("value_loss", "value_loss"), ("ratio", "ratio_mean"),
                         ("approx_kl", "approx_kl"), ("policy_clipped", "policy_clip_fraction"),
                         ("value_clipped", "value_clip_fraction")):  # fmt: skip
        mean = sum(getattr(loss, name).item() for loss in losses) / (2 * tokens.item())
        assert getattr(stats, figure) == pytest.approx(mean, rel=1e-4, abs=1e-6), name
    assert stats.ratio_max == pytest.approx(losses[1].ratio_max.item(), rel=1e-5)


def test_the_microbatch_size_changes_neither_weights_nor_statistics(update):
    whole, whole_stats = update(settings(microbatch_size=8))
    for size in (1, 3):
        policy, stats = update(settings(microbatch_size=size))
        torch.testing.assert_close(flat(policy), flat(whole), atol=2e-6, rtol=1e-5)
        for name, value in vars(stats).items():
            assert value == pytest.approx(getattr(whole_stats, name), rel=1e-3, abs=2e-5), name


def test_optimizer_steps_are_epochs_times_minibatches(update):
    for epochs, minibatch, steps in ((1, 16, 1), (3, 8, 6), (2, 4, 8)):
        _, stats = update(settings(ppo_epochs=epochs, minibatch_size=minibatch))
        assert (stats.epochs, len(stats.applied)) == (epochs, steps)


def test_every_epoch_sees_every_sample_once_in_an_order_of_seed_step_and_epoch(
    tokenizer, rollout, advantages, monkeypatch
):
    policy, seen = fresh_policy(tokenizer), []
    take = Rollout.take

    def spy(self, index):
        seen.extend(index.tolist())
        return take(self, index)

    monkeypatch.setattr(Rollout, "take", spy)
    orders = {}
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seen.clear()
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        update_policy(Accelerator(cpu=True), policy, optimizer, rollout, advantages, settings(learning_rate=1e-9),
                      step=step, seed=seed, temperature=TEMPERATURE, layout=policy.layout)  # fmt: skip
        epochs = tuple(seen[:COUNT]), tuple(seen[COUNT:])
        assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs) and epochs[0] != epochs[1]
        assert orders.setdefault((seed, step), epochs) == epochs
    assert len(set(orders.values())) == 3


def test_early_stop_ends_after_the_epoch_that_passed_the_bound(update):
    _, first_epoch = update(settings(ppo_epochs=1))
    _, all_epochs = update(settings(ppo_epochs=3))
    assert 0 < first_epoch.approx_kl < all_epochs.approx_kl
    for bound, epochs in ((first_epoch.approx_kl / 2, 1), (first_epoch.approx_kl * 1.01, 2), (1e9, 3), (None, 3)):
        _, stats = update(settings(ppo_epochs=3, kl_early_stop=bound))
        assert (stats.epochs, len(stats.applied)) == (epochs, 2 * epochs), bound


def test_the_gradient_is_clipped_to_the_norm_and_reported_before_clipping(update, tokenizer):
    free, free_stats = update(settings(**ONE_STEP))
    held, held_stats = update(settings(**ONE_STEP | {"max_grad_norm": 0.05}))
    assert free_stats.gradient_norm > 0.5
    assert held_stats.gradient_norm == pytest.approx(free_stats.gradient_norm)
    assert moved(free, tokenizer) == pytest.approx(1e-2 * free_stats.gradient_norm, rel=1e-3)
    assert moved(held, tokenizer) == pytest.approx(1e-2 * 0.05, rel=1e-2)


def test_the_step_sets_the_learning_rate(update, tokenizer):
    linear = settings(**ONE_STEP, learning_rate_schedule="linear", steps=4)
    start, _ = update(linear, step=0)
    late, _ = update(linear, step=3)
    assert moved(late, tokenizer) == pytest.approx(moved(start, tokenizer) / 4, rel=1e-3)


def test_learning_rates_by_hand():
    def rates(**changes):
        ppo = settings(learning_rate=1.0, steps=4, **changes)
        return [learning_rate_at(step, ppo) for step in range(4)]

    assert rates(learning_rate_schedule="constant") == [1, 1, 1, 1]
    assert rates(learning_rate_schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert rates(learning_rate_schedule="constant", warmup_steps=3) == [0.25, 0.5, 0.75, 1]
    assert rates(learning_rate_schedule="linear", warmup_steps=1) == [0.5, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("precision", ("no", "bf16"))
def test_read_in_the_first_epochs_microbatches_the_first_ratio_is_one_in_any_precision(tokenizer, rollout, precision):
    PartialState._reset_state()
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    policy, ppo = fresh_policy(tokenizer), settings()
    use_fast_kernels(policy.model, "cpu")
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    engine, optimizer = accelerator.prepare(policy, optimizer)
    responses = Responses(rollout.prompt_tokens, rollout.prompt_mask, rollout.response_tokens, rollout.response_mask)
    with autocast(accelerator):
        outputs = first_epoch_outputs(accelerator, policy, responses, ppo, step=3, seed=1, temperature=TEMPERATURE)
        whole = policy_outputs(policy, responses, temperature=TEMPERATURE, microbatch_size=COUNT)
    tolerance = 1e-5 if precision == "no" else 0.2
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(outputs, name), value, atol=tolerance, rtol=tolerance, msg=name)
    fresh = replace(rollout, **vars(outputs))
    advantages = compute_advantages(fresh.scores, torch.zeros_like(fresh.logprobs), fresh.values, fresh.response_mask,
                                    kl_coef=0.0, gamma=1.0, gae_lambda=0.95)  # fmt: skip
    stats = update_policy(accelerator, engine, optimizer, fresh, advantages, ppo,
                          step=3, seed=1, temperature=TEMPERATURE, layout=policy.layout)  # fmt: skip
    assert stats.first_minibatch_ratio_deviation < 2e-5
    PartialState._reset_state()
    AcceleratorState._reset_state()


@pytest.mark.parametrize("kind", ["sgd", "fused adam"])
def test_a_minibatch_with_a_gradient_that_is_not_finite_is_skipped_and_left_out_of_the_figures(
    tokenizer, rollout, advantages, kind
):
    accelerator = Accelerator(cpu=True)

    def run(advantages):
        policy = fresh_policy(tokenizer)
        fused = torch.optim.AdamW(policy.parameters(), lr=123.0, fused=True, weight_decay=0.0)
        optimizer = torch.optim.SGD(policy.parameters(), lr=123.0) if kind == "sgd" else fused
        engine, optimizer = accelerator.prepare(policy, optimizer)
        stats = update_policy(accelerator, engine, optimizer, rollout, advantages, settings(ppo_epochs=1),
                              step=0, seed=0, temperature=TEMPERATURE, layout=policy.layout)  # fmt: skip
        moments = optimizer.optimizer.state_dict()["state"]
        return flat(policy), stats, moments

    clean, clean_stats, _ = run(advantages)
    assert clean_stats.applied == (True, True)
    spoilt = advantages.advantages.clone()
    order = generator(0, "minibatches of epoch 0", 0).permutation(COUNT)
    spoilt[order[-1], 0] = torch.inf  # in the second of two minibatches
    once, stats, moments = run(replace(advantages, advantages=spoilt))
    assert stats.applied == (True, False)
    assert once.isfinite().all() and not torch.equal(once, clean)
    assert all(torch.isfinite(value).all() for state in moments.values() for value in state.values())
    assert all(state["step"] == 1 for state in moments.values() if "step" in state)
    figures = [value for name, value in vars(stats).items() if name != "applied"]
    assert torch.tensor(figures).isfinite().all() and stats.ratio_mean == pytest.approx(1.0, abs=1e-6)
    neither, stats, _ = run(replace(advantages, advantages=torch.full_like(spoilt, torch.nan)))
    assert stats.applied == (False, False) and torch.equal(neither, flat(fresh_policy(tokenizer)))
