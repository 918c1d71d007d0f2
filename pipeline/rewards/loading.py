"""From the recipe's `reward` to a callable."""

import importlib
import sys
from pathlib import Path

import torch

from pipeline.rewards.protocol import Reward, RewardError
from pipeline.rewards.sentiment import Scale, SentimentReward

SENTIMENT = "sentiment"


def load_reward(
    reward: str, *, model_path: str, label: str, scale: Scale, batch_size: int, device: torch.device | str
) -> Reward:
    """Return the built-in sentiment reward, or the user's function for `package.module:function`.

    Raises:
        RewardError: the name is neither, or the module or function cannot be found.
        ModelError: the classifier cannot be used; see `SentimentReward`.
    """
    if reward == SENTIMENT:
        return SentimentReward(model_path, label=label, scale=scale, batch_size=batch_size, device=device)
    return load_function(reward)


def load_function(path: str) -> Reward:
    """Import `package.module:function`; the working directory counts as a place to import from.

    Raises:
        RewardError: see `load_reward`.
    """
    module_name, separator, name = path.partition(":")
    if not separator or not module_name or not name:
        raise RewardError(f"reward={path!r} is neither 'sentiment' nor of the form package.module:function.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may fail in any way
        raise RewardError(f"reward={path!r}: importing {module_name} raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"reward={path!r}: the module {module_name} has no function {name!r}.")
    return function
