"""Token rewards, GAE and whitening equal an independent float64 implementation and numbers worked out by hand."""

import independent
import pytest
import torch
from independent import ragged
from padded import assert_equals_rows, mask_of, padded

from pipeline.ppo.advantages import (
    compute_advantages,
    explained_variance,
    generalized_advantages,
    masked_mean,
    token_rewards,
    whiten,
)

SEEDS = range(5)
GARBAGE = (float("nan"), float("inf"), -float("inf"), 1e30)


def scores_of(rows, seed=99):
    return [row[0] * 3 for row in ragged(seed, len(rows))]


def test_score_lands_once_on_the_last_real_token_by_hand():
    mask = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
    kl = torch.tensor([[1.0, 9, 9], [1, 2, 9], [-1, 0, 1]])
    rewards = token_rewards(torch.tensor([10.0, 20, 30]), kl, mask, 0.5)
    assert rewards.tolist() == [[9.5, 0, 0], [-0.5, 19, 0], [0.5, 0, 29.5]]


@pytest.mark.parametrize("seed", SEEDS)
def test_token_rewards_sum_to_score_minus_beta_times_kl(seed):
    kl = ragged(seed)
    scores = scores_of(kl)
    rewards = token_rewards(torch.tensor(scores, dtype=torch.float64), padded(kl, float("nan")), mask_of(kl), 0.3)
    assert_equals_rows(rewards, independent.sequence_rewards(scores, kl, 0.3))
    assert rewards.sum(1).tolist() == pytest.approx([s - 0.3 * sum(k) for s, k in zip(scores, kl, strict=True)])


def test_gae_by_hand():
    # deltas: 1 + .5*2 - 1 = 1, 0 + .5*4 - 2 = 0, 3 - 4 = -1; each advantage is delta + .25 * the next one.
    # The second sample is one token: 7 - 3.
    rewards = torch.tensor([[1.0, 0, 3], [7, 0, 0]])
    values = torch.tensor([[1.0, 2, 4], [3, 8, 8]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[0.9375, -0.25, -1], [4, 0, 0]]
    assert returns.tolist() == [[1.9375, 1.75, 3], [7, 0, 0]]


def test_lambda_one_returns_are_discounted_reward_sums_and_lambda_zero_advantages_are_td_errors():
    rewards, values = torch.tensor([[1.0, 2, 4]]), torch.tensor([[5.0, -3, 8]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    _, returns = generalized_advantages(rewards, values, mask, gamma=0.5, gae_lambda=1.0)
    assert returns.tolist() == [[3, 4, 4]]
    advantages, _ = generalized_advantages(rewards, values, mask, gamma=0.5, gae_lambda=0.0)
    assert advantages.tolist() == [[1 - 1.5 - 5, 2 + 4 + 3, 4 - 8]]


@pytest.mark.parametrize("seed", SEEDS)
def test_advantages_equal_the_independent_implementation(seed):
    kl, values = ragged(seed), ragged(seed + 50)
    scores = scores_of(kl)
    rewards = independent.sequence_rewards(scores, kl, 0.2)
    plain, returns = independent.gae(rewards, values, 0.97, 0.9)
    result = compute_advantages(
        torch.tensor(scores, dtype=torch.float64),
        padded(kl),
        padded(values),
        mask_of(kl),
        kl_coef=0.2,
        gamma=0.97,
        gae_lambda=0.9,
    )
    assert_equals_rows(result.rewards, rewards)
    assert_equals_rows(result.returns, returns)
    assert_equals_rows(result.advantages, independent.whitened(plain))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_stands_on_padding_changes_nothing(garbage):
    kl, values = ragged(1), ragged(2)
    mask, scores = mask_of(kl), torch.tensor(scores_of(kl), dtype=torch.float64)
    settings = {"kl_coef": 0.2, "gamma": 0.97, "gae_lambda": 0.9}
    clean = compute_advantages(scores, padded(kl), padded(values), mask, **settings)
    dirty = compute_advantages(scores, padded(kl, garbage), padded(values, garbage), mask, **settings)
    for name in ("advantages", "returns", "rewards"):
        assert torch.equal(getattr(dirty, name), getattr(clean, name)), name
    assert torch.equal(whiten(padded(kl, garbage), mask), whiten(padded(kl), mask))
    assert masked_mean(padded(kl, garbage), mask) == masked_mean(padded(kl), mask)
    assert explained_variance(padded(kl, garbage), padded(values, garbage), mask) == explained_variance(
        padded(kl), padded(values), mask
    )


def test_more_padding_changes_nothing():
    kl, values = ragged(1), ragged(2)
    settings = {"kl_coef": 0.2, "gamma": 0.97, "gae_lambda": 0.9}
    scores = torch.tensor(scores_of(kl), dtype=torch.float64)
    narrow = compute_advantages(scores, padded(kl), padded(values), mask_of(kl), **settings)
    wider = [torch.nn.functional.pad(x, (0, 4)) for x in (padded(kl), padded(values), mask_of(kl))]
    wide = compute_advantages(scores, *wider, **settings)
    torch.testing.assert_close(wide.advantages[:, :-4], narrow.advantages, rtol=1e-12, atol=1e-12)
    assert (wide.advantages[:, -4:] == 0).all()


def test_whitening_by_hand():
    # Real numbers 1, 5, 3, 3: mean 3, biased variance 2.
    x, mask = torch.tensor([[1.0, 5], [3, 77], [3, 77]]), torch.tensor([[True, True], [True, False], [True, False]])
    root = 2**0.5
    torch.testing.assert_close(whiten(x, mask, eps=0), torch.tensor([[-root, root], [0, 0], [0, 0]]))


def test_whitening_is_over_the_whole_batch_not_by_row():
    rows = ragged(3, 8, 9, spread=5.0)
    mask = mask_of(rows)
    result = whiten(padded(rows) + 100, mask)
    assert result[mask].mean().item() == pytest.approx(0, abs=1e-9)
    assert result[mask].var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert result.sum(1).abs().max() > 0.1
    assert (result[~mask] == 0).all()


def test_equal_advantages_whiten_to_zero_not_nan():
    assert whiten(torch.full((2, 3), 4.0), torch.ones(2, 3, dtype=torch.bool)).tolist() == [[0.0] * 3] * 2


def test_explained_variance_by_hand_and_independently():
    mask = torch.tensor([[True, True], [True, False]])
    returns = torch.tensor([[1.0, 2], [3, -50]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((2, 2), 9.0), returns, mask) == pytest.approx(0)
    assert explained_variance(torch.zeros(2, 2), returns, mask) == pytest.approx(0)
    # residuals 0, 0, 3: variance 2; returns 1, 2, 3: variance 2/3.
    assert explained_variance(torch.tensor([[1.0, 2], [0, 0]]), returns, mask) == pytest.approx(-2)
    values, targets = ragged(4), ragged(5)
    ours = explained_variance(padded(values), padded(targets), mask_of(values)).item()
    assert ours == pytest.approx(independent.explained(values, targets), rel=1e-10)
