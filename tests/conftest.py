"""Shared pieces: tiny random models with real tokenizers, made once, and no network."""

import json
import os
import tempfile
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")  # read when it is first imported

import pytest
import torch
from terminals import Terminal
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from pipeline.data.sources import Reviews
from pipeline.models.scratch import new_config, new_tokenizer
from pipeline.rollout import graphs

SHAPES = {
    "gpt2": "n_layer=2,n_embd=32,n_head=4,n_positions=64",
    "gpt_neox": "num_hidden_layers=2,hidden_size=32,num_attention_heads=4,intermediate_size=64,"
    "max_position_embeddings=64",
    "llama": "num_hidden_layers=2,hidden_size=32,num_attention_heads=4,num_key_value_heads=2,intermediate_size=64,"
    "max_position_embeddings=64",
    "qwen2": "num_hidden_layers=2,hidden_size=32,num_attention_heads=4,num_key_value_heads=2,intermediate_size=64,"
    "max_position_embeddings=64",
}
WORDS = ["the", "film", "was", "a", "great", "good", "bad", "awful", "story", "with", "an", "actor", "who", "laughs"]


def make_reviews(count: int = 80) -> Reviews:
    """Different made-up reviews of more than 200 characters, half of them positive."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(count):
        picks = torch.randint(len(WORDS), (60,), generator=generator).tolist()
        texts.append(" ".join(WORDS[p] for p in picks))
    return Reviews(texts, [i % 2 for i in range(count)])


def random_causal_lm(model_type: str, tokenizer, *, seed: int = 0, scale: float = 3.0):
    """A tiny random causal LM whose distributions are far from uniform."""
    torch.manual_seed(seed)
    shape = new_config(model_type, SHAPES[model_type], tokenizer).to_dict() if model_type == "gpt2" else None
    if shape is None:
        config = AutoConfig.for_model(model_type)
        config.update_from_string(SHAPES[model_type])
        config.vocab_size = len(tokenizer)
        config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    else:
        config = AutoConfig.for_model(**shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


@pytest.fixture(scope="session")
def reviews() -> Reviews:
    return make_reviews()


@pytest.fixture(scope="session")
def tokenizer(reviews):
    """A byte-level BPE of 300 tokens whose only special token is EOS, as GPT-2's."""
    tokenizer = new_tokenizer("gpt2", reviews.texts, 300)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="session")
def bos_tokenizer(tokenizer):
    """The same with BOS, which it puts before every text as Llama's and Gemma's do, and a second end."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<bos>", "<end_of_turn>"])
    backend.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    end = tokenizer.eos_token
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=end, pad_token=end)


@pytest.fixture(scope="session")
def bos_lm(tmp_path_factory, bos_tokenizer):
    """The folder of a saved tiny Llama with that tokenizer, whose generation settings state both ends."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bos-llama"
    model = random_causal_lm("llama", bos_tokenizer)
    model.config.bos_token_id = bos_tokenizer.bos_token_id
    model.generation_config.eos_token_id = [bos_tokenizer.convert_tokens_to_ids("<end_of_turn>"), 0]
    model.save_pretrained(folder)
    bos_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory, tokenizer):
    """The folder of a saved tiny GPT-2."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    random_causal_lm("gpt2", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def untied_lm(tmp_path_factory, tokenizer):
    """The folder of a saved tiny Llama, whose head and embedding are two."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    random_causal_lm("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory, reviews):
    """The folder of a saved tiny DistilBERT with the labels NEGATIVE and POSITIVE."""
    folder = tmp_path_factory.mktemp("models") / "tiny-distilbert"
    tokenizer = new_tokenizer("distilbert", reviews.texts, 200)
    config = new_config("distilbert", "n_layers=1,dim=32,hidden_dim=64,n_heads=4,max_position_embeddings=64", tokenizer)
    config.id2label, config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with (
        torch.no_grad()
    ):  # fresh weights give every text the same score, and a test of order or batching proves nothing
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(12)
    model.save_pretrained(folder)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def reviews_file(tmp_path_factory, reviews):
    """A JSONL file of the reviews."""
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    rows = zip(reviews.texts, reviews.labels, strict=True)
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    return str(path)


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory, tiny_lm, tiny_classifier, reviews_file):
    """A recipe of three quick steps on the tiny models; `--setting value` pairs go after it."""
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(
        f"""model_path: {tiny_lm}
reward_model_path: {tiny_classifier}
dataset: {reviews_file}
steps: 3
rollout_batch_size: 16
minibatch_size: 8
microbatch_size: 3
rollout_microbatch_size: 5
ppo_epochs: 2
response_min_tokens: 2
response_max_tokens: 10
learning_rate: 1.0e-3
evaluation_prompts: 8
samples_every_steps: 1
"""
    )
    return str(path)


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory, tiny_recipe):
    """A LoRA run whose policy has left the original."""
    from launching import run_here

    from pipeline import train

    folder = tmp_path_factory.mktemp("lora") / "run"
    options = ("--use_peft", "--lora_r", "4", "--learning_rate", "3e-2", "--reward_scale", "probability")
    assert run_here(train.main, "--config", tiny_recipe, "--output_dir", folder, *options) == 0
    return folder


@pytest.fixture
def captured(monkeypatch) -> list[int]:
    """Has decoding take the CPU for a device with graphs, whose replay is the step; which model each was made of."""
    models = []

    def capture(steps):
        models.append(id(steps.model))
        return SimpleNamespace(replay=steps.step)

    monkeypatch.setattr(graphs, "GRAPHED", "cpu")
    monkeypatch.setattr(graphs, "_capture", capture)
    return models


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe and return its path."""

    def write(text: str) -> str:
        path = tmp_path / "my_recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    """A terminal of 80 columns that can show everything."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return Terminal(80, 24)
