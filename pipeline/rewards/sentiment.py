"""The sentiment of prompt + response, as a text classifier with its own tokenizer judges it."""

from typing import Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig

from pipeline.models.kernels import many_forwards, use_fast_kernels
from pipeline.models.loading import ModelError, opening, require_whole
from pipeline.models.vocabulary import check_vocabulary

Scale = Literal["logit", "probability", "log_odds"]


class SentimentReward:
    """Scores texts by the logit, the probability or the log-odds of one label of a classifier.

    `lvwerra/distilbert-imdb` and the shipped `assets/distilbert-imdb-mini` have the labels NEGATIVE and POSITIVE. Of
    a text longer than the classifier reads, its end is judged, which is where the response is.
    """

    def __init__(
        self,
        model_path: str,
        *,
        label: str = "POSITIVE",
        scale: Scale = "logit",
        batch_size: int = 128,
        device: torch.device | str = "cpu",
        setting: str = "reward_model_path",
    ):
        """
        Args:
            model_path: a path or a Hub name of a sequence classifier.
            label: found by name in the classifier's configuration, case ignored.
            scale: `log_odds` is the label's logit minus the log-sum-exp of the others', and `probability` their
                sigmoid; where labels do not exclude each other (`problem_type` is multi_label_classification), the
                label's logit itself, as transformers' text-classification pipeline has it.
            batch_size: texts a forward.
            setting: of the recipe, which names `model_path` in messages.

        Raises:
            ModelError: the classifier cannot be opened or has no such label.
        """
        self.label_index = label_index(model_path, label, setting)
        self.scale: Scale = scale
        self.batch_size = batch_size
        with opening(model_path, setting):
            if scale != "logit" and has_logits_alone(model_path, setting):
                raise ModelError(f"reward_scale={scale!r}: {model_path!r} has one output; its only scale is logit.")
            self.tokenizer = AutoTokenizer.from_pretrained(model_path, truncation_side="left")
            check_vocabulary(self.tokenizer, AutoConfig.from_pretrained(model_path), f"{setting}={model_path!r}")
            self.model, found = AutoModelForSequenceClassification.from_pretrained(
                model_path, dtype=torch.float32, output_loading_info=True
            )
        require_whole(found, f"{setting}={model_path!r} is no trained classifier")
        use_fast_kernels(self.model, device).requires_grad_(False).eval().to(device)
        self.max_length = min(self.tokenizer.model_max_length, _positions(self.model))
        self._check_batches(f"{setting}={model_path!r}")

    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Scores (n,) of prompt + response on the chosen scale."""
        return self.measures(prompts, responses)[self.scale]

    def measures(self, prompts: list[str], responses: list[str]) -> dict[str, Tensor]:
        """Every scale at once: {"logit", "probability", "log_odds"}, each (n,) float32 on the CPU."""
        logits = self._logits([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
        own = logits[:, self.label_index]
        if _each_for_itself(self.model.config):
            log_odds = own
        elif logits.shape[1] == 1:  # a reward model has neither probability nor odds
            return {"logit": own}
        else:
            others = logits.clone()
            others[:, self.label_index] = -torch.inf
            log_odds = own - others.logsumexp(-1)
        return {"logit": own, "probability": log_odds.sigmoid(), "log_odds": log_odds}

    @torch.no_grad()
    def _logits(self, texts: list[str]) -> Tensor:
        """(n, labels). Texts are batched by length, so that little is spent on padding."""
        if not texts:
            return torch.zeros(0, self.model.config.num_labels)
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length).input_ids
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        logits = torch.empty(len(ids), self.model.config.num_labels)
        with many_forwards(self.model):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                logits[batch] = self._batch_logits([ids[i] for i in batch])
        return logits

    def _batch_logits(self, ids: list[list[int]]) -> Tensor:
        """(n, labels) of one batch, padded on the right, where neither positions nor a causal model are moved by it."""
        stated = self.model.config.pad_token_id
        # Decoders judge at the last token that is not their configuration's padding: that is what batches are padded
        # with, whatever the tokenizer's is. One that states none judges at the last token, which must not be padding.
        pad, has_one = stated, stated is not None and 0 <= stated < self.model.config.get_text_config().vocab_size
        if not has_one:
            last = {row[-1] for row in ids if row}
            pad = self.model.config.pad_token_id = next(i for i in range(len(last) + 1) if i not in last)
        try:
            width = max(1, *map(len, ids))
            inputs = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
            device = self.model.device
            return self.model(input_ids=inputs.to(device), attention_mask=mask.to(device)).logits.float().cpu()
        finally:
            self.model.config.pad_token_id = stated

    @torch.no_grad()
    def _check_batches(self, named: str) -> None:
        """Raise `ModelError` where logits are NaN, or a short text has other ones beside a longer one."""
        short, long = self.tokenizer(
            ["a", "a film that is good"], truncation=True, max_length=self.max_length
        ).input_ids
        alone, together = self._batch_logits([short]), self._batch_logits([short, long])
        if not (together.abs() < torch.inf).all():
            raise ModelError(f"{named} cannot be used: its logits are NaN or infinite, so its files are damaged.")
        if (alone[0] - together[0]).abs().max() > 1e-3 * max(1.0, alone.abs().max().item()):
            kind = self.model.config.model_type
            raise ModelError(f"{named}: {kind} classifiers score a text otherwise in a batch with longer ones.")


def _positions(model: torch.nn.Module) -> int:
    """How many positions the classifier has; RoBERTa's begin after its padding index."""
    positions = getattr(model.config, "max_position_embeddings", 10**9)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1
    return positions


def _each_for_itself(config: PreTrainedConfig) -> bool:
    """Whether several labels may be true of one text."""
    return config.problem_type == "multi_label_classification"


def has_logits_alone(model_path: str, setting: str = "reward_model_path") -> bool:
    """Whether it is a reward model with one output, whose only scale is the logit; raises `ModelError`."""
    with opening(model_path, setting):
        config = AutoConfig.from_pretrained(model_path)
    return config.num_labels == 1 and not _each_for_itself(config)


def label_index(model_path: str, label: str, setting: str = "reward_model_path") -> int:
    """Position of `label` among a classifier's outputs, read from its configuration alone.

    Raises:
        ModelError: the configuration cannot be opened or names no such label.
    """
    with opening(model_path, setting):
        labels = AutoConfig.from_pretrained(model_path).id2label
    for index, name in labels.items():
        if name.lower() == label.lower():
            return int(index)
    raise ModelError(
        f"the classifier {model_path!r} has no label {label!r}; its labels are {', '.join(labels.values())}. "
        f"Set {'reward_label' if setting == 'reward_model_path' else setting} to one of them."
    )
