"""`pipeline.sft` and `pipeline.reward_model` from scratch on tiny shapes: train, get cut off, resume, save, card."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_interrupted import file_size_limit
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline import reward_model, sft
from pipeline.data.sources import Reviews
from pipeline.errors import Stopped, UserError, WriteError
from pipeline.inputs import keep_to_inputs
from pipeline.models.loading import ModelError
from pipeline.supervised import newest_checkpoint

SHARED = ["--per_device_train_batch_size", "8", "--save_steps", "4", "--logging_steps", "1", "--save_total_limit", "1"]
SHARED += ["--eval_strategy", "steps", "--eval_steps", "50"]
SHARED += ["--report_to", "none", "--disable_tqdm", "true"]


def run(monkeypatch, module, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


def refuses_other_texts(monkeypatch, module, arguments: list[str], capsys) -> None:
    """A training that goes on with one text less; what it was trained on is as before after that."""
    data = Path(arguments[next(i for i, name in enumerate(arguments) if name.startswith("--dataset")) + 1])
    before = data.read_text()
    data.write_text(before.split("\n", 1)[1])
    capsys.readouterr()
    with pytest.raises(
        UserError, match=re.escape(f"dataset={str(data)!r}: its texts are not those that ") + ".*-4 was "
    ):
        run(monkeypatch, module, *arguments, "--max_steps", "8")
    data.write_text(before)


def test_sft_from_scratch_resumes_and_saves_a_model_plain_transformers_load(
    tmp_path, monkeypatch, reviews_file, capsys
):
    reviews_file = shutil.copy(reviews_file, tmp_path)
    with open(reviews_file, "a") as file:
        file.write("\n" + json.dumps({"text": None}) + "\n" + json.dumps({}))
    output = tmp_path / "lm"
    arguments = ["--model_type", "gpt2", "--config_overrides", "n_layer=1,n_embd=16,n_head=2,n_positions=32"]
    arguments += ["--vocab_size", "300", "--dataset", reviews_file, "--max_length", "32", "--output_dir", str(output)]
    arguments += ["--gradient_checkpointing", "false", "--bf16", "false", "--eval_reviews", "3", *SHARED]
    run(monkeypatch, sft, *arguments, "--max_steps", "4")
    refuses_other_texts(monkeypatch, sft, arguments, capsys)
    run(monkeypatch, sft, *arguments, "--max_steps", "8")
    state = json.loads((output / "checkpoint-8" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, 9))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.dtype == torch.bfloat16 and len(tokenizer) == model.config.vocab_size <= 300
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    said = capsys.readouterr().out
    assert "Held-out openings continued:" in said and f"2 of 82 rows of {reviews_file} have no text" in said
    card = (output / "README.md").read_text()
    assert "python -m pipeline.sft" in card and "held-out perplexity" in card and "## Limits" in card


def test_chunks_are_full_but_for_short_reviews_which_end_with_eos(tokenizer):
    short, long = tokenizer("a good film").input_ids, tokenizer("the story was great").input_ids
    size = len(short) + 1
    assert 2 * size > len(long) + 1 > size  # one full chunk and a rest
    chunks, notes = sft.chunk_reviews(["a good film", "the story was great"], tokenizer, size)
    assert chunks["input_ids"] == [[*short, tokenizer.eos_token_id], long[:size]]
    left_out, all_tokens = len(long) + 1 - size, len(short) + len(long) + 2
    assert [note.split(" are in rests")[0] for note in notes] == [f"{left_out} of {all_tokens} training tokens"]


def test_reward_model_from_scratch_resumes_and_learns_labels_by_name(tmp_path, monkeypatch, capsys):
    data = tmp_path / "labelled.jsonl"
    words = ["awful", "great", "boring", "lovely", "bad", "good"]  # one a text, so that each must be learned
    texts = [f"{word} film {word} and number {i} was {word}" for i, word in enumerate(words * 40)]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)] + [{"text": "", "label": 0}]
    data.write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "classifier"
    arguments = [
        "--model_type",
        "distilbert",
        "--datasets",
        str(data),
        "--vocab_size",
        "200",
        "--learning_rate",
        "3e-3",
    ]
    arguments += [
        "--config_overrides",
        "n_layers=1,dim=32,hidden_dim=32,n_heads=2,max_position_embeddings=32,initializer_range=0.2",
    ]
    arguments += ["--max_window", "32", "--output_dir", str(output), *SHARED]
    run(monkeypatch, reward_model, *arguments, "--max_steps", "4")
    refuses_other_texts(monkeypatch, reward_model, arguments, capsys)
    vocabulary = AutoTokenizer.from_pretrained(output).get_vocab()
    run(monkeypatch, reward_model, *arguments, "--max_steps", "300")
    assert AutoTokenizer.from_pretrained(output).get_vocab() == vocabulary
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"} and model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer([f"{word} film {word} was {word}" for word in words], return_tensors="pt", padding=True)
    assert model(**inputs).logits.argmax(-1).tolist() == [0, 1, 0, 1, 0, 1]
    said = capsys.readouterr().out
    assert "Held out:" in said and f"1 of 241 rows of {data} have no text" in said
    assert "accuracy on" in (output / "README.md").read_text()


@pytest.mark.parametrize("arguments_type", [sft.SFTArguments, reward_model.RewardModelArguments])
def test_neither_or_both_of_model_path_and_model_type_are_refused(arguments_type):
    for settings in ({}, {"model_path": "a", "model_type": "gpt2"}):
        with pytest.raises(ModelError, match="not both"):
            arguments_type(**settings)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["--max_length", "65"], "max_length=65 is more than the 64 positions the model has"),
        (["--max_length", "1"], "max_length=1: must be"),
        (["--num_train_epochs", "0"], "num_train_epochs=0.0: must be positive"),
        (["--max_steps", "0"], "max_steps=0: must be positive"),
        (["--eval_reviews", "0"], "eval_reviews=0: must be positive"),
        (["--learning_rate", "nan"], "learning_rate=nan"),
        (["--output_dir", "/dev/null/out"], "output_dir='/dev/null/out' cannot be written"),
    ],
)
def test_sft_refuses_what_cannot_be_trained_before_training(
    tmp_path, monkeypatch, reviews_file, tiny_lm, settings, fault
):
    monkeypatch.setattr(sft, "train", lambda *_: pytest.fail("it was trained"))
    arguments = ["--model_path", tiny_lm, "--dataset", reviews_file, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match=fault):
        run(monkeypatch, sft, *arguments, "--max_length", "32", *SHARED, *settings)


@pytest.mark.parametrize("fault", ["its logits are NaN", "its tokenizer has ids up to"])
def test_sft_refuses_a_model_that_cannot_be_used_before_training(tmp_path, monkeypatch, reviews_file, tiny_lm, fault):
    monkeypatch.setattr(sft, "train", lambda *_: pytest.fail("it was trained"))
    folder = shutil.copytree(tiny_lm, tmp_path / "model")
    if "NaN" in fault:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
        model.save_pretrained(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"<{i}>" for i in range(AutoModelForCausalLM.from_pretrained(folder).config.vocab_size)])
        tokenizer.save_pretrained(folder)
    arguments = ["--model_path", str(folder), "--dataset", reviews_file, "--max_length", "32", "--bf16", "false"]
    with pytest.raises(ModelError, match=fault):
        run(monkeypatch, sft, *arguments, "--output_dir", str(tmp_path / "out"), *SHARED)


def test_a_checkpoint_whose_weights_are_cut_is_passed_over_by_name(tmp_path, capsys):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        save_file({"weight": torch.zeros(3)}, tmp_path / f"checkpoint-{step}" / "model.safetensors")
    weights = tmp_path / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    assert newest_checkpoint(str(tmp_path)).endswith("checkpoint-1")
    assert "checkpoint-2 is not whole and passed over" in capsys.readouterr().out


def test_a_cut_note_of_what_was_trained_on_is_named_with_the_remedy(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "inputs.json").write_text("{")
    with pytest.raises(UserError, match=r"inputs.json, which says .* cannot be read .*; remove it"):
        keep_to_inputs(SimpleNamespace(output_dir=str(tmp_path), process_index=0), "data", [Reviews(["a"], None)])


def test_sft_without_a_length_is_refused(tmp_path, monkeypatch, tiny_lm):
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(f"model_path: {tiny_lm}\nmax_length: null\noutput_dir: {tmp_path / 'out'}\n")
    with pytest.raises(UserError, match="max_length=None: must be a number of tokens"):
        run(monkeypatch, sft, "--config", str(recipe))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["--max_window", "65"], "max_window=65 is more than the 64 positions"),
        (["--token_dropout", "1"], "token_dropout=1.0: must be in"),
        (["--model_path", "DECODER"], "is not an encoder: its tokenizer has no cls, sep, mask token"),
        (["--num_train_epochs", "0"], "num_train_epochs=0.0: must be positive"),
    ],
)
def test_the_reward_model_refuses_what_cannot_be_trained_before_training(
    tmp_path, monkeypatch, reviews_file, tiny_classifier, tiny_lm, settings, fault
):
    monkeypatch.setattr(reward_model, "train", lambda *_: pytest.fail("it was trained"))
    arguments = ["--model_path", tiny_classifier, "--datasets", reviews_file, "--output_dir", str(tmp_path / "out")]
    settings = [tiny_lm if setting == "DECODER" else setting for setting in settings]
    with pytest.raises(UserError, match=fault):
        run(monkeypatch, reward_model, *arguments, "--max_window", "32", *SHARED, *settings)


def interrupted(monkeypatch, trainer, method: str, number: int) -> None:
    """Send a signal in the first call of a trainer's method."""
    before = getattr(trainer, method)

    def then(self, *arguments, **settings):
        if not hasattr(self, "interrupted"):
            self.interrupted = True
            signal.raise_signal(number)
        return before(self, *arguments, **settings)

    monkeypatch.setattr(trainer, method, then)


def test_sft_ends_on_a_signal_and_on_a_full_disk_with_its_checkpoints_whole(
    tmp_path, monkeypatch, reviews_file, tiny_lm
):
    output = tmp_path / "lm"
    arguments = ["--model_path", tiny_lm, "--dataset", reviews_file, "--max_length", "32", "--output_dir", str(output)]
    arguments += ["--gradient_checkpointing", "false", "--bf16", "false", *SHARED, "--max_steps", "6"]
    with monkeypatch.context() as patch:
        interrupted(patch, sft.LogitsTrainer, "training_step", signal.SIGUSR1)
        with pytest.raises(Stopped, match="Stopped by SIGUSR1 after 1 of 6 steps; the same command goes on") as stopped:
            run(patch, sft, *arguments)
    assert stopped.value.number == signal.SIGUSR1 and newest_checkpoint(str(output)).endswith("checkpoint-1")
    with file_size_limit(50_000), pytest.raises(WriteError, match=f"a checkpoint in {output} could not be written"):
        run(monkeypatch, sft, *arguments)
    assert newest_checkpoint(str(output)).endswith("checkpoint-1"), "half of checkpoint-4 is passed over"
    with monkeypatch.context() as patch:
        interrupted(patch, sft.LogitsTrainer, "prediction_step", signal.SIGTERM)  # after the last step
        with pytest.raises(Stopped, match="Stopped by SIGTERM after 6 of 6 steps"):
            run(patch, sft, *arguments)
    assert newest_checkpoint(str(output)).endswith("checkpoint-6")
    assert "## Limits" not in (output / "README.md").read_text(), "TRL's own card"
    run(monkeypatch, sft, *arguments)
    assert "## Limits" in (output / "README.md").read_text()


def test_the_reward_model_ends_on_a_signal_in_an_evaluation_with_a_checkpoint(
    tmp_path, monkeypatch, reviews_file, tiny_classifier
):
    output = tmp_path / "classifier"
    arguments = ["--model_path", tiny_classifier, "--datasets", reviews_file, "--output_dir", str(output)]
    arguments += ["--max_window", "32", *SHARED, "--eval_steps", "1", "--max_steps", "3"]
    interrupted(monkeypatch, reward_model.WholeTextTrainer, "evaluate", signal.SIGINT)
    with pytest.raises(Stopped, match="Stopped by SIGINT after 1 of 3 steps"):
        run(monkeypatch, reward_model, *arguments)
    assert newest_checkpoint(str(output)).endswith("checkpoint-1")
