"""Training the classifier: the windows it sees, its accuracy on whole texts, and the labels it accepts."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.data.sources import DataError, is_held_out
from pipeline.errors import UserError
from pipeline.reward_model import RewardModelArguments, WindowCollator, accuracy, load_labelled, tokenize


@pytest.fixture(scope="module")
def words(tiny_classifier):
    """The classifier's tokenizer."""
    return AutoTokenizer.from_pretrained(tiny_classifier)


@pytest.fixture(scope="module")
def examples(reviews, words) -> list[dict]:
    return list(tokenize(reviews, words))[:6]


def collate(words, examples, *, bounds: tuple[int, int] = (8, 24), dropout: float = 0.0) -> dict[str, torch.Tensor]:
    return WindowCollator(words, min_window=bounds[0], max_window=bounds[1], token_dropout=dropout)(examples)


def test_tokens_are_whole_texts_without_special_tokens(reviews, words):
    tokens = tokenize(reviews, words)
    assert tokens["label"][:4] == [0, 1, 0, 1]
    assert words.decode(tokens["tokens"][0]) == reviews.texts[0]
    assert not set(words.all_special_ids) & set(tokens["tokens"][0])


def test_windows_have_every_length_within_the_bounds_and_no_other(words, examples):
    torch.manual_seed(0)
    lengths = {collate(words, examples, bounds=(5, 9))["input_ids"].shape[1] for _ in range(200)}
    assert lengths == {5, 6, 7, 8, 9}


def test_a_window_is_a_cut_of_the_text_between_cls_and_sep(words, examples):
    torch.manual_seed(0)
    starts = set()
    for _ in range(50):
        batch = collate(words, examples)
        assert batch["attention_mask"].all(), "one length for all, so nothing is padded"
        assert batch["labels"].tolist() == [example["label"] for example in examples]
        for ids, example in zip(batch["input_ids"].tolist(), examples, strict=True):
            assert (ids[0], ids[-1]) == (words.cls_token_id, words.sep_token_id)
            size, tokens = len(ids) - 2, example["tokens"]
            places = [i for i in range(len(tokens) - size + 1) if tokens[i : i + size] == ids[1:-1]]
            assert places
            starts.update(places)
    longest = max(len(example["tokens"]) for example in examples)
    assert 0 in starts
    assert max(starts) > longest - 30


def test_a_short_text_is_kept_whole_and_padded(words, examples):
    short = {"tokens": examples[0]["tokens"][:3], "label": 1}
    batch = collate(words, [short, examples[1]], bounds=(12, 12))
    assert batch["attention_mask"].sum(1).tolist() == [5, 12]
    assert batch["input_ids"][0].tolist() == [
        words.cls_token_id,
        *short["tokens"],
        words.sep_token_id,
        *[words.pad_token_id] * 7,
    ]


def test_no_special_token_is_masked_and_every_other_one_can_be(words, examples):
    short = {"tokens": examples[0]["tokens"][:3], "label": 1}
    batch = collate(words, [short, examples[1]], bounds=(12, 12), dropout=1.0)
    mask, cls, sep, pad = words.mask_token_id, words.cls_token_id, words.sep_token_id, words.pad_token_id
    assert batch["input_ids"].tolist() == [[cls, *[mask] * 3, sep, *[pad] * 7], [cls, *[mask] * 10, sep]]


def test_about_the_asked_share_of_tokens_is_masked(words, examples):
    torch.manual_seed(0)
    ids = torch.cat([collate(words, examples, bounds=(30, 30), dropout=0.2)["input_ids"] for _ in range(50)])
    share = (ids[:, 1:-1] == words.mask_token_id).float().mean().item()
    assert share == pytest.approx(0.2, abs=0.02)


def test_masking_does_not_touch_the_data_set(words, examples):
    before = json.dumps(examples)
    collate(words, examples, dropout=1.0)
    assert json.dumps(examples) == before


WINDOW = 16


@pytest.fixture(scope="module")
def judged(tiny_classifier, words, reviews):
    """A classifier that tells texts apart, and texts of 0 to 60 tokens labelled with its own judgement.

    The judgement is made here, one window at a time: mean logits of the fewest windows of about equal size.
    """
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tiny_classifier)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(12)
    lengths = [0, 1, 13, 14, 15, 28, 29, 60] * 5
    texts = [row["tokens"][:length] for row, length in zip(tokenize(reviews, words), lengths, strict=False)]
    margins = []
    for tokens in texts:
        count = max(1, -(-len(tokens) // (WINDOW - 2)))
        size = max(1, -(-len(tokens) // count))
        windows = [tokens[i : i + size] for i in range(0, len(tokens), size)] or [[]]
        with torch.no_grad():
            whole = [torch.tensor([[words.cls_token_id, *window, words.sep_token_id]]) for window in windows]
            logits = torch.cat([model(ids).logits for ids in whole]).mean(0)
        margins.append((logits[1] - logits[0]).item())
    middle = sorted(margins)[len(margins) // 2] - 1e-3
    model.classifier.bias.data[1] -= middle  # so that both judgements occur
    labels = [int(margin > middle) for margin in margins]
    assert 10 < sum(labels) < 30
    return model, Dataset.from_dict({"tokens": texts, "label": labels})


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64, 1000])
def test_whole_texts_are_judged_by_the_mean_of_their_windows_for_any_batch_size(judged, words, batch_size):
    model, texts = judged
    assert accuracy(model, words, texts, window=WINDOW, batch_size=batch_size) == 1.0


def test_accuracy_is_the_share_of_right_judgements(judged, words):
    model, texts = judged
    labels = list(texts["label"])
    labels[:10] = [1 - label for label in labels[:10]]
    wrong = Dataset.from_dict({"tokens": texts["tokens"], "label": labels})
    assert accuracy(model, words, wrong, window=WINDOW) == pytest.approx(0.75)


def arguments(*datasets: str, **settings) -> RewardModelArguments:
    return RewardModelArguments(datasets=list(datasets), model_type="distilbert", **settings)


def write(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_labelled_reviews_are_split_by_their_text(reviews_file, reviews):
    ((name, (training, held_out)),) = load_labelled(arguments(reviews_file)).items()
    assert name == reviews_file
    assert held_out.texts == [text for text in reviews.texts if is_held_out(text)]
    assert len(training) + len(held_out) == 80
    assert training.labels == [reviews.labels[reviews.texts.index(text)] for text in training.texts]


def test_missing_labels_are_named_with_file_and_column(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(DataError) as caught:
        load_labelled(arguments(path, label_column="stars"))
    assert repr(path) in str(caught.value)
    assert "'stars'" in str(caught.value)


@pytest.mark.parametrize(
    "labels", [["pos", "neg"], [1, 2], [0, 0], [1, 1], [0, None], [0, 1, 2], [0.5, 1.0], [-1, 1]], ids=str
)
def test_labels_other_than_0_and_1_are_named(tmp_path, labels):
    path = write(tmp_path / "r.jsonl", [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)])
    with pytest.raises(DataError) as caught:
        load_labelled(arguments(path))
    message = str(caught.value)
    assert repr(path) in message
    assert "0 (negative) and 1 (positive) are expected" in message
    assert str(labels[0]) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "model_path"),
        ({"model_path": "a", "model_type": "distilbert"}, "model_path"),
        ({"model_type": "distilbert", "min_window": 3}, "min_window=3"),
        ({"model_type": "distilbert", "min_window": 9, "max_window": 8}, "max_window=8"),
    ],
)
def test_settings_that_contradict_each_other_are_named(settings, named):
    with pytest.raises(UserError, match=named):
        RewardModelArguments(**settings)
