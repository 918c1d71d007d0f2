"""The sentiment reward: the right label, the right scale, and the same score in any company."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHAPES
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
    pipeline,
)

from pipeline.models.loading import ModelError
from pipeline.rewards.sentiment import SentimentReward

PROMPTS = ["the film was", "a good story with an actor who", "the", "an awful", "bad"]
RESPONSES = [" great", " laughs and laughs and laughs", " bad film was a bad bad story", "", " actor"]
TEXTS = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


@torch.no_grad()
def direct_logits(folder: str, text: str) -> torch.Tensor:
    """(labels,) from transformers alone, one text, no padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=64)).logits[0]


def save_classifier(folder: Path, like: str, labels: list[str]) -> str:
    """A classifier of random weights large enough that texts score differently, with the labels in this order."""
    config = AutoConfig.from_pretrained(like)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: index for index, name in enumerate(labels)}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(12)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifier(tiny_classifier, tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("classifiers"), tiny_classifier, ["NEGATIVE", "POSITIVE"])


@pytest.fixture(scope="module")
def positive_first(tiny_classifier, tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("classifiers"), tiny_classifier, ["POSITIVE", "NEGATIVE"])


@pytest.fixture(scope="module")
def three_labels(tiny_classifier, tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("classifiers"), tiny_classifier, ["neutral", "positive", "negative"])


@pytest.mark.parametrize(("folder", "index"), [("classifier", 1), ("positive_first", 0), ("three_labels", 1)])
def test_the_label_is_found_by_name_whatever_its_place(request, folder, index):
    path = request.getfixturevalue(folder)
    expected = torch.stack([direct_logits(path, text)[index] for text in TEXTS])
    assert torch.allclose(SentimentReward(path)(PROMPTS, RESPONSES), expected, atol=1e-5)


def test_another_label_can_be_rewarded_and_its_case_does_not_matter(three_labels):
    expected = torch.stack([direct_logits(three_labels, text)[2] for text in TEXTS])
    assert torch.allclose(SentimentReward(three_labels, label="NeGaTive")(PROMPTS, RESPONSES), expected, atol=1e-5)


@pytest.mark.parametrize(("folder", "index"), [("classifier", 1), ("three_labels", 1)])
def test_probability_and_log_odds_are_those_of_the_softmax(request, folder, index):
    path = request.getfixturevalue(folder)
    measures = SentimentReward(path).measures(PROMPTS, RESPONSES)
    probability = torch.stack([direct_logits(path, text).softmax(-1)[index] for text in TEXTS])
    assert torch.allclose(measures["probability"], probability, atol=1e-5)
    assert torch.allclose(measures["log_odds"], (probability / (1 - probability)).log(), atol=1e-4)
    assert probability.max() - probability.min() > 0.05, "the texts must differ for this to prove anything"


def test_two_labels_give_log_odds_of_the_difference_of_logits(classifier):
    expected = torch.stack([direct_logits(classifier, text) for text in TEXTS])
    scores = SentimentReward(classifier, scale="log_odds")(PROMPTS, RESPONSES)
    assert torch.allclose(scores, expected[:, 1] - expected[:, 0], atol=1e-5)


@pytest.mark.parametrize("scale", ["logit", "probability", "log_odds"])
def test_the_reward_is_the_measure_of_its_scale(three_labels, scale):
    reward = SentimentReward(three_labels, scale=scale)
    scores = reward(PROMPTS, RESPONSES)
    assert torch.equal(scores, reward.measures(PROMPTS, RESPONSES)[scale])
    assert scores.dtype == torch.float32
    assert scores.shape == (5,)
    assert not scores.requires_grad


@pytest.mark.parametrize("batch_size", [1, 2, 3, 128])
def test_a_text_scores_the_same_alone_in_any_batch_and_in_any_order(classifier, batch_size):
    alone = torch.stack([direct_logits(classifier, text)[1] for text in TEXTS])
    assert alone.std() > 0.05
    reward = SentimentReward(classifier, batch_size=batch_size)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [1, 1, 3], [2]):
        scores = reward([PROMPTS[i] for i in order], [RESPONSES[i] for i in order])
        assert torch.allclose(scores, alone[order], atol=1e-5)


def test_only_the_concatenation_of_prompt_and_response_counts(classifier):
    reward = SentimentReward(classifier)
    whole, cut = reward(["the film was great", "the film"], ["", " was great"])
    assert whole.item() == pytest.approx(cut.item(), abs=1e-6)


def test_empty_texts_and_no_texts_have_scores_too(classifier):
    reward = SentimentReward(classifier)
    assert reward(["", "the"], ["", ""]).isfinite().all()
    assert reward([], []).shape == (0,)


def test_labels_that_do_not_exclude_each_other_have_a_probability_each(three_labels, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(three_labels, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"problem_type": "multi_label_classification"}))
    expected = pipeline("text-classification", str(folder), top_k=None)(TEXTS)
    expected = [next(found["score"] for found in text if found["label"] == "positive") for text in expected]
    measures = SentimentReward(str(folder), scale="probability").measures(PROMPTS, RESPONSES)
    assert measures["probability"].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(measures["log_odds"], measures["logit"])


@pytest.mark.parametrize("tokenizer_knows", [True, False])
def test_of_a_text_beyond_the_classifiers_positions_the_end_is_judged(classifier, tmp_path, tokenizer_knows):
    folder = tmp_path / "copy"
    shutil.copytree(classifier, folder)
    if not tokenizer_knows:  # then the model's own number of positions must do
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        del settings["model_max_length"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    prompt, response = "the film was good " * 100, "an awful bad film and an actor"
    scores = SentimentReward(str(folder))([prompt, "the"], [response, " film"])
    assert scores[0].item() == pytest.approx(direct_logits(classifier, prompt + response)[1].item(), abs=1e-5)
    assert scores[0].item() != pytest.approx(direct_logits(classifier, prompt)[1].item(), abs=1e-2)
    assert scores[1].item() == pytest.approx(direct_logits(classifier, "the film")[1].item(), abs=1e-5)


def test_the_classifier_is_frozen_and_in_evaluation_mode(classifier):
    reward = SentimentReward(classifier)
    assert not reward.model.training
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())


def test_a_missing_label_names_the_labels_there_are(three_labels):
    with pytest.raises(ModelError, match="no label 'JOY'; its labels are neutral, positive, negative") as caught:
        SentimentReward(three_labels, label="JOY")
    assert three_labels in str(caught.value)
    assert "reward_label" in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "nobody/no-such-classifier"])
def test_a_missing_classifier_names_setting_and_path(path):
    with pytest.raises(ModelError, match="no such folder") as caught:
        SentimentReward(path)
    assert f"reward_model_path={path!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_names_setting_and_path(tmp_path):
    with pytest.raises(ModelError) as caught:
        SentimentReward(str(tmp_path))
    assert f"reward_model_path={str(tmp_path)!r}" in str(caught.value)
    assert Path(tmp_path).is_dir()


def test_a_classifier_whose_positions_begin_after_its_padding_index_is_not_overrun(classifier, tmp_path):
    config = RobertaConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=34, id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(classifier, model_max_length=10**9).save_pretrained(tmp_path)
    assert SentimentReward(str(tmp_path))(["film " * 100], [" good"]).isfinite().all()


def save_decoder(folder: Path, bos_tokenizer, *, pad: int | None, trained_head: bool = True) -> str:
    """A tiny Llama that judges texts, with this padding id in its configuration; its tokenizer pads with 0, EOS."""
    config = AutoConfig.for_model("llama")
    config.update_from_string(SHAPES["llama"])
    config.vocab_size, config.pad_token_id = len(bos_tokenizer), pad
    config.id2label, config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if trained_head else AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    bos_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("pad", [None, 0, 5, 200, -1])
@pytest.mark.parametrize("tokenizer_pads", ["right", "left", "not at all"])
def test_a_decoder_judges_a_text_the_same_in_any_batch_whatever_pads(pad, tokenizer_pads, bos_tokenizer, tmp_path):
    path = save_decoder(tmp_path, bos_tokenizer, pad=pad)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if tokenizer_pads == "not at all":
        del settings["pad_token"]
    else:
        settings["padding_side"] = tokenizer_pads
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    alone = torch.stack([direct_logits(path, text)[1] for text in TEXTS])
    assert alone.std() > 0.05
    for batch_size in (2, 128):
        reward = SentimentReward(path, batch_size=batch_size)
        for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
            scores = reward([PROMPTS[i] for i in order], [RESPONSES[i] for i in order])
            torch.testing.assert_close(scores, alone[order], atol=1e-5, rtol=0)


def test_texts_that_end_with_the_token_that_pads_are_judged_as_alone(bos_tokenizer, tmp_path):
    path = save_decoder(tmp_path, bos_tokenizer, pad=bos_tokenizer(TEXTS[0]).input_ids[-1])
    alone = torch.stack([direct_logits(path, text)[1] for text in TEXTS])
    torch.testing.assert_close(SentimentReward(path)(PROMPTS, RESPONSES), alone, atol=1e-5, rtol=0)


def test_a_language_model_in_a_classifiers_place_is_refused(bos_tokenizer, tmp_path):
    path = save_decoder(tmp_path, bos_tokenizer, pad=0, trained_head=False)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["id2label"]["1"] == "POSITIVE"  # its configuration says that it is one
    with pytest.raises(ModelError, match=r"reward_model_path=.* is no trained classifier: its files lack score.weight"):
        SentimentReward(path)


def test_a_tokenizer_larger_than_the_classifiers_embedding_is_refused_with_both_sizes(classifier, tmp_path):
    shutil.copytree(classifier, tmp_path, dirs_exist_ok=True)
    larger = AutoTokenizer.from_pretrained(classifier)
    size = len(larger)
    larger.add_tokens(["unheard", "of"])
    larger.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=rf"reward_model_path=.*ids up to {size + 1}, so {size + 2} .*embedding {size}"
    ):
        SentimentReward(str(tmp_path))


def test_a_classifier_whose_logits_are_nan_is_refused(classifier, tmp_path):
    shutil.copytree(classifier, tmp_path, dirs_exist_ok=True)
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"reward_model_path=.*its logits are NaN"):
        SentimentReward(str(tmp_path))
