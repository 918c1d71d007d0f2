"""The optimum's estimate against toy languages small enough to list every text."""

import itertools

import pytest
import torch

from pipeline.ppo.optimum import kl_at, optimum

PRICES = torch.tensor([2.0, 1.0, 0.5, 0.3], dtype=torch.float64)


def toy(seed=0, vocabulary=4, length=3):
    """All texts of a random Markov language: their probabilities (K,) and rewards (K,)."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(vocabulary, generator=generator, dtype=torch.float64).softmax(0)
    following = (2 * torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64)).softmax(1)
    texts = list(itertools.product(range(vocabulary), repeat=length))
    probabilities = torch.stack(
        [first[t[0]] * torch.stack([following[a, b] for a, b in itertools.pairwise(t)]).prod() for t in texts]
    )
    return probabilities, torch.randn(len(texts), generator=generator, dtype=torch.float64)


def exact(probabilities, rewards, price):
    """Reward and KL of the optimal policy, from its definition."""
    best = probabilities * (rewards / price).exp()
    best = best / best.sum()
    return (best * rewards).sum().item(), (best * (best / probabilities).log()).sum().item()


def sampled(probabilities, rewards, count, seed=1):
    draws = torch.multinomial(probabilities, count, replacement=True, generator=torch.Generator().manual_seed(seed))
    return rewards[draws]


def test_with_every_text_as_often_as_it_is_likely_the_estimate_is_exact():
    counts = torch.tensor([5, 3, 1, 7, 2, 2], dtype=torch.float64)
    rewards = torch.tensor([0.1, 2.0, -1.0, 0.5, 1.5, -0.3], dtype=torch.float64)
    estimate = optimum(rewards.repeat_interleave(counts.long()).unsqueeze(0), PRICES)
    for i, price in enumerate(PRICES):
        reward, kl = exact(counts / counts.sum(), rewards, price)
        assert estimate.reward[i, 0].item() == pytest.approx(reward, rel=1e-10)
        assert estimate.kl[i, 0].item() == pytest.approx(kl, rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_from_samples_it_comes_close_to_the_enumerated_optimum(seed):
    probabilities, rewards = toy(seed)
    many = torch.stack([sampled(probabilities, rewards, 50_000, seed=s) for s in range(4)])
    estimate = optimum(many, PRICES)
    for i, price in enumerate(PRICES):
        reward, kl = exact(probabilities, rewards, price)
        assert estimate.reward[i].mean().item() == pytest.approx(reward, abs=0.03)
        assert estimate.kl[i].mean().item() == pytest.approx(kl, abs=0.03)


def test_no_policy_has_more_reward_at_that_kl():
    probabilities, rewards = toy()
    reward, kl = exact(probabilities, rewards, 0.5)
    generator = torch.Generator().manual_seed(5)
    for _ in range(200):
        tilt = 2 * torch.randn(len(rewards), generator=generator, dtype=torch.float64)
        other = probabilities * (rewards / 0.7 + tilt).exp()
        other = other / other.sum()
        if (other * (other / probabilities).log()).sum() <= kl:
            assert (other * rewards).sum() <= reward + 1e-9


def test_cheaper_kl_buys_reward_with_fewer_effective_samples():
    probabilities, rewards = toy()
    estimate = optimum(sampled(probabilities, rewards, 2000).unsqueeze(0), PRICES)
    assert (estimate.reward.diff(dim=0) > 0).all() and (estimate.kl.diff(dim=0) > 0).all()
    assert (estimate.effective_samples.diff(dim=0) < 0).all()
    assert (estimate.effective_samples >= 1).all() and (estimate.effective_samples <= 2000).all()


def test_equal_rewards_leave_the_reference_as_it_is():
    estimate = optimum(torch.full((2, 100), 0.7, dtype=torch.float64), PRICES)
    assert torch.allclose(estimate.kl, torch.zeros(4, 2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(estimate.effective_samples, torch.tensor(100.0, dtype=torch.float64))


def test_kl_between_two_points_is_interpolated_and_outside_is_unknown():
    rewards, kls = torch.tensor([[0.5, 0.7, 0.9], [0.4, 0.6, 0.7]]), torch.tensor([[0.0, 1.0, 3.0], [0.0, 2.0, 4.0]])
    assert kl_at(torch.tensor([0.6, 0.6]), rewards, kls).tolist() == pytest.approx([0.5, 2.0])
    one, other = kl_at(torch.tensor([0.8, 0.8]), rewards, kls)
    assert one.item() == pytest.approx(2.0) and other.isnan()
    assert kl_at(torch.tensor([0.3, 0.3]), rewards, kls).isnan().all()


def test_prompts_with_fewer_samples_are_estimated_from_those_they_have():
    many, few = torch.tensor([0.1, 0.5, 1.0, 0.4]).double(), torch.tensor([0.9, 0.2]).double()
    both = optimum(torch.stack([many, torch.cat([few, torch.full((2,), torch.nan).double()])]), PRICES)
    for row, alone in enumerate((many, few)):
        single = optimum(alone.unsqueeze(0), PRICES)
        for name in ("reward", "kl", "effective_samples"):
            assert torch.allclose(getattr(both, name)[:, row], getattr(single, name)[:, 0]), name
