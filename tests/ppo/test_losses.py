"""The clipped losses, their statistics and their gradients equal an independent implementation and hand arithmetic."""

import independent
import pytest
import torch
from independent import ragged

from pipeline.ppo.losses import policy_losses, ppo_loss

CLIPS = {"clip_range": 0.2, "value_clip_range": 0.3, "value_coef": 0.7}
STATS = (
    "loss",
    "policy_loss",
    "value_loss",
    "policy_clipped",
    "value_clipped",
    "approx_kl",
    "ratio",
    "ratio_max",
    "ratio_deviation",
)


def batch(seed: int) -> list[independent.Rows]:
    """Log-probs, values, old log-probs, old values, advantages, returns; some beyond each bound, some within."""
    old_logprobs, old_values = ragged(seed, spread=1.5), ragged(seed + 1)
    moved = ragged(seed + 2, spread=0.3), ragged(seed + 3, spread=0.4)
    old_logprobs = [[-abs(x) for x in row] for row in old_logprobs]
    logprobs, values = (
        [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(rows, by, strict=True)]
        for rows, by in zip((old_logprobs, old_values), moved, strict=True)
    )
    return [logprobs, values, old_logprobs, old_values, ragged(seed + 4), ragged(seed + 5)]


def flat(rows: independent.Rows) -> torch.Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


def one_token(logprob=0.0, value=0.0, old_logprob=0.0, old_value=0.0, advantage=0.0, ret=0.0):
    """The loss of a single token, with the gradients of log-prob and value."""
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (logprob, value, old_logprob, old_value, advantage, ret)]
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    result = ppo_loss(*tensors, **CLIPS)
    result.loss.backward()
    return result, tensors[0].grad.item(), tensors[1].grad.item()


@pytest.mark.parametrize("seed", range(0, 60, 10))
def test_losses_statistics_and_gradients_equal_the_independent_implementation(seed):
    rows = batch(seed)
    expected = independent.ppo(*rows, **CLIPS)
    logprobs, values, *others = (flat(r) for r in rows)
    logprobs.requires_grad_()
    values.requires_grad_()
    result = ppo_loss(logprobs, values, *others, **CLIPS)
    for name in STATS:
        assert getattr(result, name).item() == pytest.approx(expected[name], rel=1e-9), name
    result.loss.backward()
    torch.testing.assert_close(logprobs.grad, flat(expected["logprob_gradient"]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(values.grad, flat(expected["value_gradient"]), rtol=1e-10, atol=1e-10)


def test_the_random_batches_clip_some_tokens_and_not_others():
    rows = batch(0)
    expected = independent.ppo(*rows, **CLIPS)
    tokens = sum(map(len, rows[0]))
    assert 0 < expected["policy_clipped"] < tokens and 0 < expected["value_clipped"] < tokens


@pytest.mark.parametrize("seed", (0, 10))
def test_gradients_equal_finite_differences(seed):
    rows = batch(seed)
    logprobs, values, *others = (flat(r) for r in rows)
    assert torch.autograd.gradcheck(
        lambda a, b: ppo_loss(a, b, *others, **CLIPS).loss,
        (logprobs.requires_grad_(), values.requires_grad_()),
        eps=1e-7,
        atol=1e-5,
    )


def test_policy_loss_by_hand():
    up, down = torch.tensor(1.5).log().item(), torch.tensor(0.5).log().item()
    for log_ratio, advantage, loss, clipped, gradient in (
        (0.0, 2.0, -2.0, 0, -2.0),  # on policy
        (up, 2.0, -2.4, 1, 0.0),  # good and already likelier: held at 1.2
        (up, -2.0, 3.0, 0, 3.0),  # bad and likelier: full price
        (down, 2.0, -1.0, 0, -1.0),  # good and less likely: full pull
        (down, -2.0, 1.6, 1, 0.0),  # bad and already less likely: held at 0.8
    ):
        result, slope, _ = one_token(logprob=log_ratio - 1, old_logprob=-1.0, advantage=advantage)
        assert result.policy_loss.item() == pytest.approx(loss)
        assert result.policy_clipped.item() == clipped
        assert slope == pytest.approx(gradient)


def test_value_loss_by_hand():
    for value, ret, loss, clipped, gradient in (
        (1.1, 2.0, 0.405, 0, -0.63),  # within old +- 0.3: half of 0.9 squared; 0.7 * -0.9
        (1.5, 2.0, 0.245, 1, 0.0),  # moved 0.5 towards the return: held at 1.3, half of 0.7 squared
        (1.5, 0.0, 1.125, 0, 1.05),  # moved 0.5 away from it: full price
        (0.5, 0.0, 0.245, 1, 0.0),  # downwards: held at 0.7
    ):
        result, _, slope = one_token(value=value, old_value=1.0, ret=ret)
        assert result.value_loss.item() == pytest.approx(loss)
        assert result.loss.item() == pytest.approx(0.7 * loss)
        assert result.value_clipped.item() == clipped
        assert slope == pytest.approx(gradient)


def test_values_within_the_range_are_never_counted_as_clipped():
    draw = torch.Generator().manual_seed(0)
    old, values = (0.05 * torch.randn(1024, generator=draw).clamp(-2, 2) for _ in range(2))  # at most 0.2 apart
    zeros, returns = torch.zeros(1024), 0.3 * torch.randn(1024, generator=draw)
    result = ppo_loss(zeros, values, zeros, old, zeros, returns, **CLIPS)
    assert result.value_clipped == 0


def test_ratio_statistics_by_hand():
    ratios, zeros = torch.tensor([2.0, 0.5, 1.0, 1.25]), torch.zeros(4)
    result = ppo_loss(ratios.log(), zeros, zeros, zeros, zeros, zeros, **CLIPS)
    assert result.ratio.item() == pytest.approx(4.75)
    assert result.ratio_max.item() == pytest.approx(2)
    assert result.ratio_deviation.item() == pytest.approx(1)
    # sum of r - 1 - log r: the logs of 2 and 1/2 cancel.
    assert result.approx_kl.item() == pytest.approx(0.75 - 0.22314355)


def test_deviation_sees_ratios_below_one():
    result, _, _ = one_token(logprob=torch.tensor(0.25).log().item())
    assert result.ratio_deviation.item() == pytest.approx(0.75)
    assert result.ratio_max.item() == pytest.approx(0.25)


def test_microbatches_add_up_to_the_minibatch():
    tensors = [flat(r) for r in batch(20)]
    whole = ppo_loss(*tensors, **CLIPS)
    parts = [ppo_loss(*(x[i] for x in tensors), **CLIPS) for i in (slice(0, 1), slice(1, 9), slice(9, None))]
    for name in STATS[:7]:
        assert sum(getattr(p, name).item() for p in parts) == pytest.approx(getattr(whole, name).item()), name
    assert max(p.ratio_max for p in parts) == whole.ratio_max


def test_the_policy_loss_is_the_sum_of_the_tokens_own():
    logprobs, _, old_logprobs, _, advantages, _ = (flat(r) for r in batch(10))
    whole = ppo_loss(*(flat(r) for r in batch(10)), **CLIPS)
    assert policy_losses(logprobs, old_logprobs, advantages, 0.2).sum().item() == pytest.approx(
        whole.policy_loss.item()
    )


def test_only_the_losses_with_a_part_in_the_update_carry_a_gradient():
    rows = batch(0)
    logprobs, values, *others = (flat(r) for r in rows)
    result = ppo_loss(logprobs.requires_grad_(), values.requires_grad_(), *others, **CLIPS)
    assert result.loss.requires_grad
    assert result.value_loss.requires_grad
    assert not any(getattr(result, name).requires_grad for name in STATS if name not in ("loss", "value_loss"))
