"""Text of others (a server's, a model's, a file's) on its way to a terminal, a page or a Markdown file stays text.

Also the one place that takes credentials out of addresses before they are shown, logged or written.
"""

import re
from typing import TypeVar

T = TypeVar("T")

HIDDEN = "***"
# To the next blank or bracket, or to a quotation mark behind which nothing of the address can follow.
_ADDRESS = re.compile(r"(https?://)((?:[^\s<>'\"]|['\"](?![\s,;:.)\]}]|$))*)", re.IGNORECASE)
_PUNCTUATION = ":;,.)]}"  # at the end of an address: the sentence's
_WEIGHT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)  # of a reward, after the address's last =


def shown(text: str) -> str:
    """A message as a terminal or a log may have it: without credentials, with control characters made visible."""
    return printable(without_secrets(text))


def printable(text: str) -> str:
    """The text with `\\x1b` and the like for what would move a cursor, ring, set a title or turn the writing around.

    Line feeds and tabs stay.
    """
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def without_secrets(value: T) -> T:
    """Text, or a list or dict of texts, whose http addresses have *** for user, password and the values of a query.

    The number after a query's last `=` stays where it may be the weight of a reward.
    """
    if isinstance(value, str):
        return _ADDRESS.sub(_masked_address, value)
    if isinstance(value, dict):
        return {name: without_secrets(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(own) for own in value)
    return value


def masked_query(query: str) -> str:
    """`token=abc&model=large` as `token=***&model=***`."""
    return "&".join(_masked_parameter(parameter) for parameter in query.split("&"))


def _masked_address(found: re.Match[str]) -> str:
    scheme, rest = found.groups()
    address = rest.rstrip(_PUNCTUATION)
    odd = re.match(r"[^/?#@]*:\D", address) is not None  # no port: a password, in which ? and / stand as they are
    user, _, place = (address if odd else address.partition("?")[0]).rpartition("@")
    place, question_mark, query = address[len(user) + 1 if user else 0 :].partition("?")
    return scheme + (f"{HIDDEN}@" if user else "") + place + question_mark + masked_query(query) + rest[len(address) :]


def _masked_parameter(parameter: str) -> str:
    name, equals, value = parameter.partition("=")
    if not equals:
        return HIDDEN if name else ""
    before, separator, number = value.rpartition("=")
    if separator and _WEIGHT.fullmatch(number):
        return f"{name}={HIDDEN if before else ''}={number}"
    return f"{name}={HIDDEN if value else ''}"


def markdown_text(text: str) -> str:
    """The text on one line, for Markdown and its tables: no markup, HTML, image, link or further column comes of it."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(printable(text).split()))


def markdown_code(text: str) -> str:
    """The text on one line as code within a Markdown sentence, whatever backticks are in it."""
    text = " ".join(shown(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    blank = " " if "`" in text else ""
    return f"{fence}{blank}{text}{blank}{fence}"


def markdown_block(text: str, language: str = "") -> str:
    """The text as a block of code of a Markdown file, which nothing in it can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{shown(text)}\n{fence}"


def plotly_text(value: T) -> T:
    """A figure as JSON has it, its texts without what Plotly takes for tags: `<a href>`, `<b>`, entities."""
    if isinstance(value, str):
        return value.replace("&", "&amp;").replace("<", "&lt;")
    if isinstance(value, dict):
        return {name: plotly_text(own) for name, own in value.items()}
    if isinstance(value, list):
        return [plotly_text(own) for own in value]
    return value
