"""Running moments and the shaping of scores, against numpy and by hand."""

import numpy as np
import pytest
import torch

from pipeline.rewards.scaling import RunningMoments, shaped_scores


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_moments_of_batches_are_those_of_their_concatenation(offset):
    rng = np.random.default_rng(0)
    batches = [rng.normal(offset + i, 1 + i, size) for i, size in enumerate((7, 1, 32, 2))]
    moments = RunningMoments()
    for i, batch in enumerate(batches):
        moments.update(torch.from_numpy(batch))
        seen = np.concatenate(batches[: i + 1])
        assert moments.count == len(seen)
        assert moments.mean == pytest.approx(seen.mean(), rel=1e-12)
        assert moments.std == pytest.approx(seen.std(), rel=1e-9)


def test_float32_scores_lose_nothing_over_many_batches():
    rng = np.random.default_rng(0)
    scores = rng.normal(50, 0.1, (400, 64)).astype(np.float32)
    moments = RunningMoments()
    for batch in scores:
        moments.update(torch.from_numpy(batch))
    assert moments.mean == pytest.approx(scores.astype(np.float64).mean(), rel=1e-10)
    assert moments.std == pytest.approx(scores.astype(np.float64).std(), rel=1e-8)


def test_scaling_divides_by_the_deviation_of_all_scores_so_far_and_does_not_centre():
    moments = RunningMoments()
    # mean 2, deviation 1
    assert shaped_scores(torch.tensor([1.0, 3.0]), moments, None).tolist() == [1.0, 3.0]
    # of 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    second = shaped_scores(torch.tensor([5.0, 7.0]), moments, None)
    assert second.tolist() == pytest.approx([5 / 5**0.5, 7 / 5**0.5])
    assert (moments.count, moments.mean, moments.squares) == (4, 4.0, 20.0)


def test_clipping_comes_after_scaling():
    scores = torch.tensor([-4.0, 0.0, 4.0, -8.0, 8.0])
    deviation = (160 / 5) ** 0.5
    expected = [-4 / deviation, 0.0, 4 / deviation, -1.2, 1.2]
    assert shaped_scores(scores, RunningMoments(), 1.2).tolist() == pytest.approx(expected)


def test_clipping_alone_keeps_the_scale():
    assert shaped_scores(torch.tensor([-9.0, -2.0, 0.5, 3.0]), None, 2.5).tolist() == [-2.5, -2.0, 0.5, 2.5]


def test_without_scaling_and_clipping_scores_stay_as_they_are():
    scores = torch.tensor([-9.0, 0.5])
    assert torch.equal(shaped_scores(scores, None, None), scores)


def test_the_raw_scores_are_not_changed_in_place():
    scores = torch.tensor([-4.0, 4.0])
    shaped_scores(scores, RunningMoments(), 0.5)
    assert scores.tolist() == [-4.0, 4.0]


def test_a_first_batch_of_equal_scores_is_not_blown_up():
    assert shaped_scores(torch.tensor([2.0, 2.0]), RunningMoments(), None).abs().max() < 1e3
