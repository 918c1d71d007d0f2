"""The model card written beside every model this project saves, and what the cards of others say of their licence."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from huggingface_hub import CardData, DatasetCard, ModelCard

from pipeline.foreign_text import markdown_block, markdown_text


def write_model_card(
    directory: Path, *, title: str, summary: str, command: str, figures: Mapping[str, object], limits: str
) -> None:
    """Write `README.md` into `directory`: what the model is, the command that made it, its figures, its limits."""
    table = markdown_table([["", ""], *([name, _show(value)] for name, value in figures.items())])
    sections = {"Made by": markdown_block(command), "Figures": table, "Limits": limits}
    write_card(directory, title, summary, sections)


def write_card(
    directory: Path, title: str, summary: str, sections: Mapping[str, str], metadata: CardData | None = None
) -> None:
    """Write `README.md`: metadata in the Hub's format, title, summary, and the sections under their headings.

    Summary and sections are Markdown.
    """
    head = "" if metadata is None else f"---\n{metadata.to_yaml()}\n---\n\n"
    body = "\n\n".join(
        [f"# {markdown_text(title)}", summary, *(f"## {name}\n\n{text}" for name, text in sections.items())]
    )
    (directory / "README.md").write_text(f"{head}{body}\n", encoding="utf-8")


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first row the header; whatever a cell holds is shown as it is."""
    lines = ["| " + " | ".join(map(markdown_text, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def stated_licence(path: str, kind: type[ModelCard] | type[DatasetCard]) -> str | None:
    """The licence that the card of a folder, or of a name on the Hub, states; None where none is to be read."""
    if Path(path).is_file():
        return None
    try:
        card = kind.load(Path(path) / "README.md" if Path(path).is_dir() else path, ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError):  # no card, no such name, no network, no sense in it
        return None
    licence = card.data.to_dict().get("license")
    return None if not licence else ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence)


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
