"""From the recipe's `reward` to what scores responses."""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pipeline.rewards import reading
from pipeline.rewards.composed import Component, ComposedReward
from pipeline.rewards.protocol import Reward, RewardError, short
from pipeline.rewards.remote import RemoteReward
from pipeline.rewards.repetition import Repetition
from pipeline.rewards.sentiment import Scale, SentimentReward, has_logits_alone, label_index
from pipeline.rewards.terms import Term, classifier_of, length_range, repetition_words


def check_terms(terms: Sequence[Term], *, model_path: str, label: str) -> None:
    """Look for classifiers' labels and users' functions; loads no weights.

    Raises:
        RewardError, ModelError: as `load_reward`.
    """
    for term in terms:
        if term.kind in ("sentiment", "classifier"):
            path, own_label, setting = _classifier(term, model_path, label)
            label_index(path, own_label, setting)
        elif term.kind == "function":
            load_function(term.source)


def load_reward(
    terms: Sequence[Term],
    *,
    model_path: str,
    label: str,
    scale: Scale,
    batch_size: int,
    timeout: float,
    whitening: bool,
    device: torch.device | str,
) -> ComposedReward:
    """Make the components that the terms name.

    Args:
        model_path, label: the classifier of `sentiment`.
        scale: of all classifiers' scores, but for a `classifier:` of one output, which has a logit only.
        batch_size: texts a forward or request.
        timeout: seconds, of a remote reward.

    Raises:
        RewardError: a module or function cannot be found.
        ModelError: a classifier cannot be used; see `SentimentReward`.
    """

    def of_texts(term: Term) -> Reward:
        if term.kind == "remote":
            return RemoteReward(term.source, batch_size=batch_size, timeout=timeout)
        if term.kind == "repetition":
            return Repetition(repetition_words(term.source))
        if term.kind == "function":
            return load_function(term.source)
        path, own_label, setting = _classifier(term, model_path, label)
        own_scale = "logit" if term.kind == "classifier" and has_logits_alone(path, setting) else scale
        return SentimentReward(
            path, label=own_label, scale=own_scale, batch_size=batch_size, device=device, setting=setting
        )

    def component(term: Term) -> Component:
        if term.kind == "length":
            of_reading = reading.Length(*length_range(term.source))
            return Component(term.name, term.weight, of_reading=of_reading, source=term.source)
        if term.kind in ("fluency", "coherence"):
            of_reading = getattr(reading, term.kind)
            unprompted = term.kind == "coherence"
            return Component(term.name, term.weight, of_reading=of_reading, unprompted=unprompted, source=term.source)
        return Component(term.name, term.weight, of_texts=of_texts(term), source=term.source)

    return ComposedReward([component(term) for term in terms], whitening)


def _classifier(term: Term, model_path: str, label: str) -> tuple[str, str, str]:
    """Path, label, and the setting that names them."""
    if term.kind == "sentiment":
        return model_path, label, "reward_model_path"
    path, own_label = classifier_of(term)
    return path, own_label, "reward"


def load_function(path: str) -> Callable:
    """Import `package.module:function`; the working directory counts as a place to import from.

    Raises:
        RewardError: the name has another form, or the module or function cannot be found.
    """
    module_name, separator, name = path.partition(":")
    if not separator or not module_name or not name:
        raise RewardError(f"reward={path!r} is not of the form package.module:function.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may fail in any way
        raise RewardError(
            f"reward={path!r}: importing {module_name} raised {type(error).__name__}: {short(error)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"reward={path!r}: the module {module_name} has no function {name!r}.")
    return function
