"""Tokens drawn from uniform numbers follow the distribution and never leave its support."""

import pytest
import torch

from pipeline.config import RolloutSettings
from pipeline.rollout.sampling import SamplingOptions, inverse_cdf, next_tokens, restrict, sampling_noise

LARGEST = 1 - 2**-24  # the largest float32 below 1
INF = float("inf")
FIRST = torch.tensor([0])  # position in the response


def rows(probabilities, count: int) -> torch.Tensor:
    return torch.as_tensor(probabilities, dtype=torch.float32).expand(count, -1)


def test_inverse_cdf_by_hand():
    uniforms = torch.tensor([0.0, 0.2, 0.25, 0.7, 0.75, 0.99])
    assert inverse_cdf(rows([0.25, 0.5, 0.25], 6), uniforms).tolist() == [0, 0, 1, 1, 2, 2]


def test_an_even_grid_of_uniforms_gives_each_token_its_share():
    torch.manual_seed(0)
    probabilities, count = (2 * torch.randn(50)).softmax(0), 20_000
    uniforms = (torch.arange(count) + 0.5) / count
    counts = inverse_cdf(rows(probabilities, count), uniforms).bincount(minlength=50)
    assert (counts - count * probabilities).abs().max() <= 2


def test_random_uniforms_give_frequencies_within_chance():
    draw = torch.Generator().manual_seed(0)
    probabilities, count = torch.tensor([0.02, 0.5, 0.0, 0.18, 0.3]), 20_000
    counts = inverse_cdf(rows(probabilities, count), torch.rand(count, generator=draw)).bincount(minlength=5)
    expected = count * probabilities
    assert counts[2] == 0
    real = expected > 0
    chi_square = ((counts - expected)[real].square() / expected[real]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom: 1 in 1000


def test_each_row_has_its_own_distribution_and_uniform():
    probabilities = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0.5, 0.5, 0], [0.5, 0.5, 0]])
    assert inverse_cdf(probabilities, torch.tensor([0.9, 0.1, 0.4, 0.6])).tolist() == [0, 2, 0, 1]


def test_the_largest_uniform_never_reaches_impossible_tokens_at_the_end():
    torch.manual_seed(0)
    for vocabulary in (10, 1000, 50_257):
        logits = 3 * torch.randn(8, vocabulary)
        logits[:, -vocabulary // 3 :] = -INF
        probabilities = logits.softmax(-1)
        tokens = inverse_cdf(probabilities, torch.full((8,), LARGEST))
        assert (probabilities.gather(1, tokens.unsqueeze(1)) > 0).all()


def test_probabilities_that_do_not_add_up_to_one_keep_their_proportions():
    for scale in (0.999, 1.001):
        probabilities = rows([0.0, 0.5 * scale, 0.5 * scale, 0.0], 4)
        assert inverse_cdf(probabilities, torch.tensor([0.0, 0.4998, 0.5002, LARGEST])).tolist() == [1, 1, 2, 2]


def test_uniform_zero_picks_the_first_possible_token():
    assert inverse_cdf(rows([0.0, 0.0, 0.5, 0.0, 0.5], 1), torch.zeros(1)).tolist() == [2]


def test_impossible_tokens_in_the_middle_are_never_picked():
    grid = torch.arange(1000) / 1000
    assert set(inverse_cdf(rows([0.5, 0.0, 0.0, 0.5], 1000), grid).tolist()) == {0, 3}


def test_top_k_keeps_the_k_likeliest():
    logits = torch.tensor([[1.0, 4, 2, 3], [4, 1, 3, 2]])
    assert restrict(logits, top_k=2, top_p=1.0).tolist() == [[-INF, 4, -INF, 3], [4, -INF, 3, -INF]]
    assert torch.equal(restrict(logits, top_k=9, top_p=1.0), logits)
    assert torch.equal(restrict(logits, top_k=0, top_p=1.0), logits)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    for top_p, kept in (
        (0.01, {1}),
        (0.49, {1}),
        (0.51, {1, 3}),
        (0.79, {1, 3}),
        (0.81, {0, 1, 3}),
        (0.99, {0, 1, 2, 3}),
    ):
        restricted = restrict(logits, top_k=0, top_p=top_p)[0]
        assert set(restricted.isfinite().nonzero().flatten().tolist()) == kept, top_p
        assert torch.equal(restricted[restricted.isfinite()], logits[0][restricted.isfinite()])


def test_top_p_is_measured_on_what_top_k_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the three likeliest the first two hold 7/9 of the mass, of all four only 7/10.
    assert restrict(logits, top_k=3, top_p=0.75).isfinite().tolist() == [[True, True, False, False]]
    assert restrict(logits, top_k=0, top_p=0.75).isfinite().tolist() == [[True, True, True, False]]


def test_drawn_tokens_obey_top_k_and_follow_what_is_left():
    logits, grid = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(700, -1), (torch.arange(700) + 0.5) / 700
    drawn = next_tokens(logits, grid, FIRST, (0,), SamplingOptions(top_k=2))
    assert drawn.bincount(minlength=4).tolist() == [0, 400, 0, 300]


def test_eos_is_forbidden_before_min_tokens_and_allowed_from_then_on():
    logits, uniforms = torch.tensor([[0.0, 50.0, 1.0]]), torch.tensor([LARGEST])
    for greedy in (False, True):
        options = SamplingOptions(min_tokens=2, greedy=greedy)
        assert [next_tokens(logits, uniforms, torch.tensor([step]), (1,), options).item() for step in range(4)] == [
            2,
            2,
            1,
            1,
        ]
    assert logits[0, 1] == 50  # the caller's logits are untouched


def test_temperature_divides_the_logits():
    logits, grid = torch.tensor([0.1, 0.9]).log().expand(820, -1), (torch.arange(820) + 0.5) / 820
    cold = next_tokens(logits, grid, FIRST, (0,), SamplingOptions(temperature=0.5))  # squares: 0.01 to 0.81
    assert cold.bincount().tolist() == [10, 810]


def test_greedy_takes_the_likeliest_whatever_the_noise():
    logits = torch.tensor([[1.0, 3, 2], [5, 3, 2]])
    assert next_tokens(logits, torch.tensor([0.0, LARGEST]), FIRST, (0,), SamplingOptions(greedy=True)).tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.9}, {"min_tokens": 1}, {"greedy": True}])
def test_only_plain_sampling_is_pure(options):
    assert SamplingOptions(temperature=0.5).is_pure
    assert not SamplingOptions(**options).is_pure


def test_a_length_limit_is_a_limit_unless_limits_are_asked_to_be_drawn():
    asked = RolloutSettings(response_max_tokens=256)
    noise, limits = sampling_noise(0, 3, 100, asked.response_min_tokens, asked.response_max_tokens)
    assert limits.tolist() == [256] * 100
    drawn_noise, drawn = sampling_noise(0, 3, 100, 250, 256)
    assert set(drawn.tolist()) == set(range(250, 257)) and torch.equal(noise, drawn_noise)
