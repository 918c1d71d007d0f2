"""Prompts begin as the model's own tokenizer begins texts; their text and the response's are what all tokens say."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pipeline.data.prompts import make_openings, prompt_batch
from pipeline.data.sources import DataError, Reviews
from pipeline.data.tokens import prefix_ids, prompt_text, start_ids, text_ids
from pipeline.preferences import tokenized
from pipeline.rollout.rollout import Responses, response_texts
from pipeline.sft import chunk_reviews

CUT = {"min_characters": 200, "max_tokens": 8}


@pytest.fixture(scope="module")
def wrapping_tokenizer(tokenizer):
    """One that puts two tokens before a text and one after it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    names = ["[gMASK]", "<sop>", "[SEP]"]
    backend.add_special_tokens(names)
    ids = [(name, backend.token_to_id(name)) for name in names]
    backend.post_processor = TemplateProcessing(single="[gMASK] <sop> $A [SEP]", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)


def test_the_prefix_is_what_the_tokenizer_itself_puts_before_a_text(tokenizer, bos_tokenizer, wrapping_tokenizer):
    assert prefix_ids(tokenizer) == () and start_ids(tokenizer) == (tokenizer.eos_token_id,)
    assert prefix_ids(bos_tokenizer) == start_ids(bos_tokenizer) == (bos_tokenizer.bos_token_id,)
    first_two = tuple(wrapping_tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"]))
    assert prefix_ids(wrapping_tokenizer) == start_ids(wrapping_tokenizer) == first_two


def test_a_prompt_begins_with_bos_once_and_its_length_counts_the_text_alone(reviews, tokenizer, bos_tokenizer):
    with_bos, without = (make_openings(reviews, one, **CUT) for one in (bos_tokenizer, tokenizer))
    bos = bos_tokenizer.bos_token_id
    for side, plain in zip(with_bos, without, strict=True):
        assert side.tokens[:, 0].tolist() == [bos] * len(side) and torch.equal(side.tokens[:, 1:], plain.tokens)
    options = {"step": 0, "batch_size": 60, "min_tokens": 2, "max_tokens": 8, "pad_token_id": 0, "seed": 0}
    batch, plain = (prompt_batch(sides[0], bos_tokenizer, **options) for sides in (with_bos, without))
    assert torch.equal(batch.mask.sum(1), plain.mask.sum(1) + 1) and batch.text == plain.text
    assert ((batch.tokens == bos).sum(1) == 1).all()
    for row, mask in zip(batch.tokens, batch.mask, strict=True):
        assert (
            row[mask][0] == bos and row[mask].tolist() == bos_tokenizer(bos_tokenizer.decode(row[mask][1:])).input_ids
        )


def test_a_text_that_spells_bos_out_gets_no_second_one_and_other_special_tokens_are_read(bos_tokenizer):
    plain, spelled, ended = text_ids(bos_tokenizer, ["the film", "<bos>the film", "the film<end_of_turn>"])
    assert spelled == plain and bos_tokenizer.bos_token_id not in plain
    assert ended == [*plain, bos_tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    assert prompt_text(bos_tokenizer, ended) == "the film"  # rewards read no special tokens
    openings, _ = make_openings(
        Reviews([f"<bos>{'the film was great ' * 12}{i} film" for i in range(400)], None), bos_tokenizer,
        min_characters=200, max_tokens=50,
    )  # fmt: skip
    assert ((openings.tokens == bos_tokenizer.bos_token_id).sum(1) == 1).all()


def test_texts_whose_likelihood_is_read_begin_with_bos_once_too(tokenizer, bos_tokenizer):
    prompts, responses = ["the film", "", "<bos>the film"], [[" was great", " was bad"]] * 3
    plain, marked = (tokenized(one, prompts[:2], responses[:2]) for one in (tokenizer, bos_tokenizer))
    bos = bos_tokenizer.bos_token_id
    assert marked[0] == ((bos, *plain[0][0]), plain[0][1]) and marked[1] == ((bos,), plain[1][1])
    assert tokenized(bos_tokenizer, prompts, responses)[2] == marked[0]


def test_a_text_for_fine_tuning_begins_with_bos_once_and_ends_with_eos(bos_tokenizer):
    whole, bos, eos = bos_tokenizer("the film was great").input_ids, bos_tokenizer.bos_token_id, 0
    assert chunk_reviews(["the film was great"], bos_tokenizer, 64)[0]["input_ids"] == [[*whole, eos]]
    first, second, *_ = chunk_reviews(["the film was great " * 4], bos_tokenizer, 4)[0]["input_ids"]
    assert first[0] == bos and bos not in [*first[1:], *second]


@pytest.mark.parametrize("text", ["a 😃 film", "👩‍👧 great", "錯很 film", "the film was"])
def test_however_a_text_is_cut_prompt_and_response_together_are_what_all_tokens_say(text, tokenizer):
    ids = torch.tensor([text_ids(tokenizer, [text])[0]])
    ones = torch.ones_like(ids, dtype=torch.bool)
    for cut in range(1, ids.shape[1]):
        prompt = prompt_text(tokenizer, ids[0, :cut])
        responses = Responses(ids[:, :cut], ones[:, :cut], ids[:, cut:], ones[:, cut:])
        assert prompt + response_texts(responses, [prompt], tokenizer)[0] == text


def test_prompts_of_texts_that_begin_alike_are_refused_with_what_helps(tokenizer):
    alike = Reviews([f"the film was a great story with an actor who laughs {i} {'x' * 200}" for i in range(40)], None)
    with pytest.raises(DataError, match=r"the 40 texts .* begin in 1 different way only.*raise prompt_max_tokens"):
        make_openings(alike, tokenizer, **CUT)
    assert sum(map(len, make_openings(alike, tokenizer, min_characters=200, max_tokens=20))) > 2


def test_prompts_of_texts_that_are_too_short_are_refused_with_what_helps(reviews, tokenizer):
    with pytest.raises(DataError, match=r"none of the 80 texts has prompt_max_tokens=500 tokens.*lower prompt_max_tok"):
        make_openings(reviews, tokenizer, min_characters=200, max_tokens=500)
    few = Reviews([*reviews.texts[:3], *(f"{text[:40]}" for text in reviews.texts[3:])], None)
    with pytest.raises(DataError, match=r"3 different ways only.*lower prompt_max_tokens where most are shorter \(77"):
        make_openings(few, tokenizer, min_characters=0, max_tokens=40)
