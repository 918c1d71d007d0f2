"""The model card written beside every model this project saves."""

from collections.abc import Mapping
from pathlib import Path


def write_model_card(
    directory: Path, *, title: str, summary: str, command: str, figures: Mapping[str, object], limits: str
) -> None:
    """Write `README.md` into `directory`: what the model is, the command that made it, its figures, its limits."""
    rows = "\n".join(f"| {name} | {_show(value)} |" for name, value in figures.items())
    (directory / "README.md").write_text(
        f"# {title}\n\n{summary}\n\n## Made by\n\n```\n{command}\n```\n\n"
        f"## Figures\n\n| | |\n|---|---|\n{rows}\n\n## Limits\n\n{limits}\n",
        encoding="utf-8",
    )


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
