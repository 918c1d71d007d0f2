"""KL estimators and the adaptive coefficient."""

import math

import independent
import pytest
import torch
from independent import ragged
from padded import mask_of, padded

from pipeline.ppo.kl import adapted_kl_coef, kl_estimate


def test_estimators_by_hand():
    logprobs, ref_logprobs = torch.tensor([0.5, 0.2, 0.3]).log(), torch.tensor([0.25, 0.4, 0.3]).log()
    log2 = math.log(2)
    for estimator, expected in (
        ("k1", [log2, -log2, 0]),
        ("k2", [log2**2 / 2, log2**2 / 2, 0]),
        ("k3", [log2 - 0.5, 1 - log2, 0]),
    ):
        assert kl_estimate(logprobs, ref_logprobs, estimator).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_default_is_k1():
    assert kl_estimate(torch.tensor([-1.0]), torch.tensor([-3.0])).tolist() == [2.0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimators_equal_the_independent_implementation(estimator):
    logprobs, ref_logprobs = ragged(0), ragged(1)
    mask = mask_of(logprobs)
    estimate = kl_estimate(padded(logprobs, float("nan")), padded(ref_logprobs, float("inf")), estimator)
    expected = [
        independent.kl(p, q, estimator)
        for ps, qs in zip(logprobs, ref_logprobs, strict=True)
        for p, q in zip(ps, qs, strict=True)
    ]
    assert estimate.shape == mask.shape
    assert estimate[mask].tolist() == pytest.approx(expected, rel=1e-9)


def test_k1_and_k3_average_to_the_exact_kl_under_the_policy_and_k3_is_never_negative():
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    exact = (p * (p / q).log()).sum().item()
    for estimator in ("k1", "k3"):
        assert (p * kl_estimate(p.log(), q.log(), estimator)).sum().item() == pytest.approx(exact)
    assert (kl_estimate(torch.randn(1000), torch.randn(1000), "k3") >= 0).all()


def test_an_unknown_estimator_raises_and_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'k4' is not one of k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_adaptive_coefficient_by_hand():
    def adapted(kl):
        return adapted_kl_coef(0.5, kl, target=6.0, horizon=1000, samples=100)

    assert adapted(6.0) == 0.5
    assert adapted(6.6) == pytest.approx(0.505)  # error 0.1: 0.5 * (1 + 0.1 * 0.1)
    assert adapted(5.7) == pytest.approx(0.4975)  # error -0.05
    assert adapted(7.2) == pytest.approx(0.51)  # error 0.2, the bound
    assert adapted(60.0) == pytest.approx(0.51)
    assert adapted(0.0) == adapted(-60.0) == pytest.approx(0.49)
