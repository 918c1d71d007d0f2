"""A reward is a callable; this module states its contract and holds others to it."""

import traceback
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.errors import UserError

# (prompts, responses) -> one score each; the text to judge is prompt + response.
Reward = Callable[[list[str], list[str]], "Sequence[float] | Tensor"]


QUOTED = 300  # characters


class RewardError(UserError, RuntimeError):
    """A reward function broke its contract; the message names the function and what it did."""


def reward_name(reward: Reward) -> str:
    """A name to show for a reward function or object."""
    return getattr(reward, "__qualname__", None) or type(reward).__name__


def checked_scores(reward: Reward, prompts: list[str], responses: list[str], name: str | None = None) -> Tensor:
    """Call the reward and return its scores as float32 on the CPU, (n,); messages call it `name`, or by its own.

    Raises:
        RewardError: it raised, returned something that is not numbers, the wrong count, or a NaN or infinity.
    """
    name = name or reward_name(reward)
    scores = _called(name, reward, prompts, responses)
    return checked(name, scores, len(responses), list(zip(prompts, responses, strict=True)))


def checked_measures(
    reward: Reward, prompts: list[str], responses: list[str], name: str | None = None
) -> dict[str, Tensor]:
    """The scales an evaluation reports, each (n,): those of the reward's `measures`, or its score alone."""
    measures: Callable[..., Mapping[str, Tensor]] | None = getattr(reward, "measures", None)
    if measures is None:
        return {"score": checked_scores(reward, prompts, responses, name)}
    name = name or reward_name(reward)
    texts = list(zip(prompts, responses, strict=True))
    return {
        key: checked(f"{name}.{key}", values, len(texts), texts)
        for key, values in _called(name, measures, prompts, responses).items()
    }


def _called(name: str, function: Callable, prompts: list[str], responses: list[str]) -> object:
    try:
        return function(list(prompts), list(responses))
    except UserError:  # says all there is to say
        raise
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(
            f"the reward {name} raised {type(error).__name__}: {short(error)} ({place.filename}, line {place.lineno})"
        ) from error


def short(text: object) -> str:
    """The beginning of what somebody else's code or server says, on one line."""
    return " ".join(str(text).split())[:QUOTED]


def checked(name: str, scores: object, count: int, texts: Sequence[tuple[str, str]] | None = None) -> Tensor:
    """Scores as float32 on the CPU, (count,); `texts` are the prompts and responses to quote.

    Raises:
        RewardError: they are not numbers, not as many, or not finite.
    """
    try:
        values = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise RewardError(f"the reward {name} returned {type(scores).__name__}, not numbers: {short(error)}") from error
    if values.shape != (count,):
        raise RewardError(
            f"the reward {name} returned shape {tuple(values.shape)} for {count} responses; ({count},) is expected."
        )
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        quoted = "" if texts is None else " (prompt {!r}, response {!r})".format(*texts[bad[0]])
        raise RewardError(
            f"the reward {name} returned {values[bad[0]].item()} for response {bad[0]}{quoted}; scores must be finite."
        )
    return values
