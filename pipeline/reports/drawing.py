"""Drawing: what all charts of a report share. Figures are Plotly's.

Colours are readable on light and dark ground; what the ground decides (text, grid) is set in the page.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, PINK, GRAY = (
    "#3b82f6", "#f0801a", "#22a55b", "#e5484d", "#9a6bf0", "#12a5a5", "#e0569b", "#8b919c",
)  # fmt: skip
GROUP_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, PINK)  # gray is the original's


@dataclass(frozen=True)
class Chart:
    """A chart of the page, or a sentence in its place."""

    key: str
    title: str
    caption: str
    figure: "Figure | None"
    missing: str = "Not recorded by this run."
    wide: bool = False


def new_figure(x: str, y: str, *, from_zero: bool = False) -> "Figure":
    """An empty figure with these titles of its axes."""
    from plotly.graph_objects import Figure  # takes a moment: only who draws pays

    return Figure(layout={
        "template": "none", "height": 260, "hovermode": "x unified",
        "xaxis": {"title": {"text": x}, "automargin": True, "zeroline": False},
        "yaxis": {"title": {"text": y}, "automargin": True, "zeroline": False, "exponentformat": "power",
                  "rangemode": "tozero" if from_zero else "normal"},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    })  # fmt: skip


def add_band(figure: "Figure", lower: tuple[list[int], list], upper: list, colour: str, label: str) -> None:
    """Fill between two lines over the same steps."""
    steps, low = lower
    if not steps:
        return
    style = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "legendgroup": label}
    figure.add_scatter(x=steps, y=upper, name=f"{label}, upper", showlegend=False, **style)
    figure.add_scatter(x=steps, y=low, name=label, fill="tonexty", fillcolor=faint(colour), **style)


def colours() -> Iterator[str]:
    """A colour a group, over and over."""
    while True:
        yield from GROUP_COLOURS


def faint(colour: str) -> str:
    """A colour of which a tenth or two is left."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def digits(value: float) -> float:
    """To six digits, which keeps the page small."""
    return float(f"{value:.6g}")
