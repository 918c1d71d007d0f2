"""Words, their n-grams, and the reward of repeating them."""

import re
from dataclasses import dataclass

_WORD = re.compile(r"[\w']+|[^\w\s]")


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams of a text's words and punctuation marks, lower case, in order."""
    words = _WORD.findall(text.lower())
    return list(zip(*(words[i:] for i in range(n)), strict=False))


@dataclass(frozen=True)
class Repetition:
    """The share of a response's n-grams that stood in it before, 0 without any (rep-n, Welleck et al. 2020).

    A reward that is paid for repeating: its weight is negative where repeating is unwanted.
    """

    n: int = 3

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        grams = [ngrams(response, self.n) for response in responses]
        return [1 - len(set(own)) / len(own) if own else 0.0 for own in grams]
