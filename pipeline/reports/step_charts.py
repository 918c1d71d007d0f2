"""Charts over PPO steps: the lines of one run, or those of several with the spread of their seeds."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.reports.drawing import BLUE, Chart, add_band, colours, digits, new_figure
from pipeline.reports.records import Group, Run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

POINTS = 1000  # of a line; more steps are averaged


@dataclass(frozen=True)
class StepChart:
    """Metrics over steps: the lines of one run, or the compared ones of several."""

    key: str
    title: str
    caption: str
    unit: str
    lines: tuple[tuple[str, str], ...]  # (metric, label)
    compared: int = 1  # how many of the lines a comparison draws: one solid, or a second one dotted
    spread: tuple[str, str, str] | None = None  # (low, high, label): metrics of a band
    from_zero: bool = False  # whether the axis of values begins at 0


STEP_CHARTS = (
    StepChart("reward", "Reward", "Mean raw score of a step's responses, and what is left of it after the price of KL.",
              "reward", (("reward/mean", "raw"), ("reward/with_kl_penalty_mean", "with KL penalty"))),
    StepChart("kl", "KL from the original", "Per response; two estimates of the same (Schulman's k1 and k3).",
              "nats a response", (("kl/sequence_k1", "k1"), ("kl/sequence_k3", "k3"))),
    StepChart("beta", "KL coefficient β", "The price of one nat, in units of reward.", "reward a nat",
              (("kl/coef", "β"),), from_zero=True),
    StepChart("entropy", "Entropy", "Of the policy's next token. A fall towards 0 is a collapse.", "nats a token",
              (("ppo/entropy", "entropy"),)),
    StepChart("length", "Response length", "Mean of a step's responses.",
              "tokens", (("response/length_mean", "mean"),),
              spread=("response/length_min", "response/length_max", "shortest to longest"), from_zero=True),
    StepChart("clip", "Clip fractions", "Share of tokens whose ratio or value left the clip range.", "share of tokens",
              (("ppo/policy_clip_fraction", "policy"), ("ppo/value_clip_fraction", "value")), compared=2,
              from_zero=True),
    StepChart("explained_variance", "Value explained variance", "1: the values foresee the returns; 0: as good as "
              "their mean.", "share of variance", (("ppo/value_explained_variance", "explained variance"),)),
    StepChart("update", "Size of the updates", "KL of the policy before the step from the policy after it.",
              "nats a token", (("ppo/approx_kl", "KL(old ‖ new)"),), from_zero=True),
)  # fmt: skip


def step_charts(groups: Sequence[Group]) -> list[Chart]:
    """The charts over steps, reward components last where there are any."""
    alone = len(groups) == 1 and len(groups[0].runs) == 1
    charts = []
    for chart in (*STEP_CHARTS, *_component_charts(groups, alone=alone)):
        caption = chart.caption
        if not alone and len(chart.lines) > 1:
            labels = [label for _, label in chart.lines]
            caption += f" Solid: {labels[0]}; dotted: {labels[1]}." if chart.compared > 1 else f" Here: {labels[0]}."
        figure = _run_figure(chart, groups[0].runs[0]) if alone else _group_figure(chart, groups)
        charts.append(Chart(chart.key, chart.title, caption, figure))
    return charts


def _component_charts(groups: Sequence[Group], *, alone: bool) -> list[StepChart]:
    """Of a composed reward: all components together for one run, one chart each for several."""
    steps = (step for group in groups for run in group.runs for step in run.steps[:1])
    found = (re.fullmatch(r"reward/(.+)/raw_mean", name) for step in steps for name in step)
    names = list(dict.fromkeys(match[1] for match in found if match))
    kinds = (("raw", "as each component scores", "score"), ("weighted", "what each adds to the reward", "reward"))
    if not alone:
        return [
            StepChart(f"component_{kind}_{i}", f"Component {name}, {kind}", f"Mean, {what}.", unit,
                      ((f"reward/{name}/{kind}_mean", name),))
            for i, name in enumerate(names) for kind, what, unit in kinds
        ]  # fmt: skip
    return [
        StepChart(f"components_{kind}", f"Reward components, {kind}", f"Means of a step's responses, {what}.", unit,
                  tuple((f"reward/{name}/{kind}_mean", name) for name in names))
        for kind, what, unit in kinds if names
    ]  # fmt: skip


def series(run: Run, metric: str) -> tuple[list[int], list[float | None]]:
    """A metric over a run's steps, averaged where there are more than `POINTS`; both empty where it has none."""
    if not any(step.get(metric) is not None for step in run.steps):
        return [], []
    size = -(-len(run.steps) // POINTS)
    windows = [run.steps[start : start + size] for start in range(0, len(run.steps), size)]
    means = []
    for window in windows:
        known = [step[metric] for step in window if step.get(metric) is not None]
        means.append(digits(sum(known) / len(known)) if known else None)
    return [window[-1]["step"] for window in windows], means


def _run_figure(chart: StepChart, run: Run) -> "Figure | None":
    figure = new_figure("PPO step", chart.unit, from_zero=chart.from_zero)
    if chart.spread:
        low, high, label = chart.spread
        add_band(figure, series(run, low), series(run, high)[1], BLUE, label)
    for (metric, label), colour in zip(chart.lines, colours(), strict=False):
        steps, values = series(run, metric)
        if steps:
            mode = "lines" if len(steps) > 1 else "markers"
            figure.add_scatter(x=steps, y=values, name=label, mode=mode, line={"color": colour, "width": 2})
    return figure if figure.data else None


def _group_figure(chart: StepChart, groups: Sequence[Group]) -> "Figure | None":
    """A line a run and, for several seeds, their mean and range; the page tells the groups' colours."""
    figure = new_figure("PPO step", chart.unit, from_zero=chart.from_zero)
    for group, colour in zip(groups, colours(), strict=False):
        for number, (metric, label) in enumerate(chart.lines[: chart.compared]):
            own = [(run.name, series(run, metric)) for run in group.runs]
            lines = [(run, line) for run, line in own if line[0]]
            if not lines:
                continue
            name = group.name if chart.compared == 1 else f"{group.name}, {label}"
            style = {"color": colour, "dash": ("solid", "dot")[number]}
            if len(group.runs) == 1:
                steps, values = lines[0][1]
                figure.add_scatter(x=steps, y=values, name=name, mode="lines", line=style | {"width": 2})
                continue
            for run, (steps, values) in lines:
                figure.add_scatter(x=steps, y=values, name=run, mode="lines", line=style | {"width": 0.7},
                                   opacity=0.5, hoverinfo="skip")  # fmt: skip
            steps, low, mean, high = over_seeds([line for _, line in lines])
            add_band(figure, (steps, low), high, colour, name)
            figure.add_scatter(x=steps, y=mean, name=name, mode="lines", line=style | {"width": 2.5})
    figure.update_layout(showlegend=False)
    return figure if figure.data else None


def over_seeds(lines: Sequence[tuple[list[int], list[float | None]]]) -> tuple[list, list, list, list]:
    """Steps, and of the runs that have each: lowest, mean and highest."""
    at: dict[int, list[float]] = {}
    for steps, values in lines:
        for step, value in zip(steps, values, strict=True):
            if value is not None:
                at.setdefault(step, []).append(value)
    steps = sorted(at)
    return (
        steps,
        *([digits(float(measure(at[step]))) for step in steps] for measure in (np.min, np.mean, np.max)),
    )
