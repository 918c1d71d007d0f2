"""The `reward` setting: names and weights of what is rewarded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.rewards.protocol import RewardError

SENTIMENT = "sentiment"
TOKEN_VARIABLE = "REWARD_TOKEN"  # of the environment: what reward servers are shown as `Authorization: Bearer`
BUILT_IN = {
    SENTIMENT: "",
    "fluency": "",
    "coherence": "",
    "repetition": r"(:[1-9])?",
    "length": r":\d+-\d+",
}  # name -> the form of what may follow it
TAKEN = {
    "reward", "score", "logit", "probability", "log_odds", "distinct_1", "distinct_2", "repeated_3", "perplexity",
    "response_tokens_mean",
}  # what evaluations call other figures  # fmt: skip
FORMS = (
    "sentiment, fluency, coherence, repetition, repetition:N (1 to 9), length:MIN-MAX, classifier:PATH:LABEL, "
    "package.module:function or http://…, each with =WEIGHT where it is not 1"
)
NGRAM = 3  # words of what `repetition` counts


@dataclass(frozen=True)
class Term:
    """One component of a reward."""

    source: str  # as written, without the weight
    weight: float
    name: str  # short, different from the others': what figures are logged under

    @property
    def kind(self) -> str:
        """sentiment, fluency, coherence, repetition, length, classifier, remote or function."""
        if self.source.startswith(("http://", "https://")):
            return "remote"
        head = self.source.partition(":")[0]
        return head if head in BUILT_IN or head == "classifier" else "function"


def parse_terms(reward: Sequence[str]) -> list[Term]:
    """Read `["sentiment=1.0", "fluency=0.3", "my_rewards:politeness=-0.2"]`; a weight left out is 1.

    Raises:
        RewardError: there is none, one has no weight or form that is known, or one stands there twice.
    """
    terms: list[Term] = []
    for text in reward:
        source, separator, number = text.rpartition("=")
        try:
            weight = float(number) if separator else 1.0
        except ValueError:  # the = of an address
            source, weight = text, 1.0
        source = source or text
        if not abs(weight) < float("inf") or weight == 0:
            raise RewardError(f"reward={text!r}: the weight must be a number other than 0; leave out what has none.")
        term = Term(source, weight, "")
        _check_form(term)
        if any(_meaning(other) == _meaning(term) for other in terms):
            raise RewardError(f"reward: {source!r} stands there twice.")
        if source != text and _lacks_a_value(term):
            raise RewardError(
                f"reward={text!r}: is {number} the weight, or does it belong to the address? Write {source}=={number} "
                f"or {text}=1."
            )
        terms.append(Term(source, weight, _free_name(_short_name(term), TAKEN | {other.name for other in terms})))
    if not terms:
        raise RewardError(f"reward is empty; give one or more of {FORMS}.")
    return terms


def _check_form(term: Term) -> None:
    source, kind = term.source, term.kind
    if kind == "remote":
        right = re.fullmatch(r"https?://[^/\s]+\S*", source)
    elif kind == "classifier":
        right = re.fullmatch(r"classifier:.+:[^:]+", source)
    elif kind == "function":
        right = re.fullmatch(r"[^:\s]+:[^:\s]+", source)
    else:
        right = re.fullmatch(kind + BUILT_IN[kind], source)
    if not right:
        raise RewardError(f"reward={source!r} is none of {FORMS}.")
    if kind == "remote" and "@" in source.partition("?")[0].split("/", 3)[2]:
        raise RewardError(
            f"reward={source!r}: user and password do not belong into an address, which is written down with the run; "
            f"set {TOKEN_VARIABLE} in the environment, which is sent as `Authorization: Bearer …`."
        )
    if kind == "length":
        low, high = length_range(source)
        if not 1 <= low <= high:
            raise RewardError(f"reward={source!r}: the range must be of at least 1 token, the smaller number first.")


def _lacks_a_value(term: Term) -> bool:
    """Whether it is an address that ends in a parameter without a value, which may be what was taken for a weight."""
    _, query, parameters = term.source.partition("?")
    return term.kind == "remote" and bool(query) and "=" not in parameters.rpartition("&")[2]


def _meaning(term: Term) -> tuple[str, ...]:
    return ("repetition", str(repetition_words(term.source))) if term.kind == "repetition" else (term.source,)


def repetition_words(source: str) -> int:
    """N of `repetition:N`."""
    return int(source.partition(":")[2] or NGRAM)


def classifier_of(term: Term) -> tuple[str, str]:
    """Path and label of `classifier:PATH:LABEL`."""
    path, _, label = term.source.removeprefix("classifier:").rpartition(":")
    return path, label


def length_range(source: str) -> tuple[int, int]:
    """Smallest and largest number of tokens of `length:MIN-MAX`."""
    low, _, high = source.removeprefix("length:").partition("-")
    return int(low), int(high)


def _short_name(term: Term) -> str:
    if term.kind == "remote":
        name = re.split("[?#]", term.source.partition("://")[2])[0]  # a query may be secret, and names go everywhere
    elif term.kind in ("classifier", "function"):
        name = term.source.rpartition(":")[2]
    elif term.kind == "repetition" and ":" in term.source:
        name = f"repetition_{repetition_words(term.source)}"
    else:
        name = term.kind
    return re.sub(r"[^\w.-]+", "_", name.lower()).strip("_") or "reward"


def _free_name(name: str, taken: set[str]) -> str:
    numbered = (name if i == 1 else f"{name}_{i}" for i in range(1, len(taken) + 2))
    return next(n for n in numbered if n not in taken)
