"""Charts of where runs ended: scores before and after, the plane of KL and reward, the results of several runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.frontiers import overspend_cell
from pipeline.plane import way_of_steps
from pipeline.reports.drawing import BLUE, GRAY, ORANGE, RED, Chart, colours, digits, faint, new_figure
from pipeline.reports.records import Group, Run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BINS = 40  # of a histogram; fewer for few samples
DIFFERENT = "These runs were rewarded by different measures ({}), which have no axis in common."
AGAIN = "Not recorded. python -m pipeline.evaluate {run} writes it."


def score_charts(groups: Sequence[Group]) -> list[Chart]:
    """Histograms of every measure before and after, the rewarded one first."""
    runs = [run for group in groups for run in group.runs]
    with_samples = [run for run in runs if run.samples]
    if not with_samples:
        named = runs[0].directory if len(runs) == 1 else "RUN"
        return [Chart("scores", "Scores before and after", "", None, AGAIN.format(run=named))]
    measured: dict[tuple[str, str], list[Run]] = {}  # a chart each: (measure, label) -> the runs that have it
    for run in with_samples:
        for name in run.samples[0]["after_measures"]:
            measured.setdefault((name, measure_label(name, run)), []).append(run)
    charts = []
    for i, ((name, label), own) in enumerate(
        sorted(measured.items(), key=lambda item: all(_rewarded(run) != item[0][0] for run in item[1]))
    ):
        caption = f"Of the responses to {len(own[0].samples)} held-out prompts; dashed: the means."
        if all(_rewarded(run) == name for run in own):
            caption += " This is what was rewarded."
        figure = _histogram(name, label, groups, own)
        charts.append(Chart(f"scores_{i}", f"{label}, before and after", caption, figure))
    return charts


def _histogram(name: str, label: str, groups: Sequence[Group], own: Sequence[Run]) -> "Figure":
    """Of one measure, of the runs that have it."""
    before = _scores(own[:1], "before", name)
    after = [(group, _scores([run for run in group.runs if run in own], "after", name)) for group in groups]
    count = min(BINS, max(8, round(2 * len(before) ** 0.5)))
    edges = np.linspace(*_range([before, *(values for _, values in after if values)]), count + 1)
    bins = {"start": edges[0], "end": edges[-1], "size": edges[1] - edges[0]}
    figure = new_figure(label, "share of responses")
    alone = len(groups) == 1 and len(groups[0].runs) == 1
    sides = [("before", before, GRAY)]
    for (group, values), colour in zip(after, colours(), strict=False):
        if values:
            sides.append(("after" if alone else group.name, values, colour))
    for side, values, colour in sides:
        figure.add_histogram(x=values, name=side, xbins=bins, histnorm="probability", opacity=0.6,
                             marker={"color": colour}, hovertemplate="%{x}: %{y:.1%}")  # fmt: skip
        figure.add_vline(x=digits(float(np.mean(values))), line={"color": colour, "width": 1.5, "dash": "dash"})
    figure.update_layout(barmode="overlay", bargap=0.02, showlegend=alone)
    figure.update_yaxes(tickformat=".0%")
    return figure


def plane_chart(groups: Sequence[Group]) -> Chart:
    """The plane of KL and reward: the best possible, the way of each run, and where it ended."""
    runs = [run for group in groups for run in group.runs]
    evaluated = [run for run in runs if run.figures and "reward" in run.figures]
    labels = rewarded_labels(evaluated)
    if len(labels) > 1:
        return Chart("plane", "Reward against KL", "", None, DIFFERENT.format(", ".join(labels)), wide=True)
    reward = labels[0] if labels else "reward"
    figure = new_figure("KL from the original, nats a response", f"mean reward: {reward}")
    alone = len(runs) == 1
    curves = [run.figures["frontier_curve"] for run in evaluated if "frontier_curve" in run.figures]
    comparable = bool(curves) and all(curve == curves[0] for curve in curves)
    if comparable:
        _frontier(figure, curves[0], BLUE if alone else GRAY)
    for group, colour in zip(groups, colours(), strict=False):
        for run in group.runs:
            way = way_of_steps(run.steps, _metric(run))
            figure.add_scatter(
                x=[digits(point["kl"]) for point in way], y=[digits(point["reward"]) for point in way],
                text=[f"to step {point['step']}" for point in way], mode="lines+markers",
                name="training, means of steps" if alone else f"way of {run.name}", showlegend=alone,
                opacity=1 if alone else 0.7, line={"color": ORANGE if alone else colour,
                "width": 1.5 if alone else 1}, marker={"size": 5 if alone else 3},
            )  # fmt: skip
    if evaluated:
        before = evaluated[0].figures["reward"]["before"]["mean"]
        figure.add_scatter(x=[0], y=[before], mode="markers", name="original, held-out prompts",
                           marker={"color": GRAY, "size": 10, "symbol": "diamond"})  # fmt: skip
    for group, colour in zip(groups, colours(), strict=False):
        ended = [run for run in group.runs if run in evaluated]
        if ended:
            label = "tuned, held-out prompts (95 % interval)" if alone else group.name
            _ends(figure, ended, RED if alone else colour, label, legend=alone)
    overspent = next((run for run in evaluated if alone and "kl_overspend" in run.figures.get("frontier", {})), None)
    if overspent:
        _overspend(figure, overspent.figures["frontier"])
    figure.update_layout(hovermode="closest", height=440)
    caption = "Further up and to the left is better: more reward for less distance from the original."
    if curves and not comparable:
        caption += " The best possible is not the same for all of these runs and not drawn."
    elif any(run.config.get("reward_whitening") for run in runs):
        caption += " Of a whitened reward there is no best possible: its scale moves."
    elif not curves:
        caption += (
            " The best possible at each KL is not recorded; ./launch.sh frontier, then pipeline.evaluate write it."
        )
    figure = figure if any(len(trace.x) for trace in figure.data) else None
    return Chart("plane", "Reward against KL", caption, figure, wide=True)


def _frontier(figure: "Figure", curve: dict[str, object], colour: str) -> None:
    """The best possible, solid where it rests on enough samples, dotted beyond, with the interval of its KL."""
    known = [point for point in zip(curve["band_reward"], curve["band_kl_low"], curve["band_kl_high"], strict=True)
             if None not in point]  # fmt: skip
    if known:
        levels, low, high = zip(*known, strict=True)
        figure.add_scatter(x=[*low, *reversed(high)], y=[*levels, *reversed(levels)], fill="toself", mode="lines",
                           line={"width": 0}, fillcolor=faint(colour), showlegend=False, hoverinfo="skip",
                           name="95 % interval of the best possible")  # fmt: skip
    trusted = curve["trusted"]
    kl, rewards = ([digits(x) for x in curve[name]] for name in ("kl", "reward"))
    figure.add_scatter(x=kl[:trusted], y=rewards[:trusted], mode="lines", name="best possible",
                       line={"color": colour, "width": 2.5})  # fmt: skip
    figure.add_scatter(x=kl[max(0, trusted - 1) :], y=rewards[max(0, trusted - 1) :], mode="lines",
                       name="best possible, too few samples to be sure",
                       line={"color": colour, "width": 1.5, "dash": "dot"})  # fmt: skip


def _ends(figure: "Figure", runs: Sequence[Run], colour: str, label: str, *, legend: bool) -> None:
    kls = [run.figures["kl"] for run in runs]
    rewards = [run.figures["reward"]["after"]["mean"] for run in runs]
    errors = {"type": "data", "symmetric": False, "color": colour, "thickness": 1.5}
    low, high = np.array([run.figures["kl_ci95"] for run in runs]).T
    x_error = errors | {"array": (high - kls).tolist(), "arrayminus": (kls - low).tolist()}
    low, high = np.array([run.figures["reward"]["after"]["ci95"] for run in runs]).T
    y_error = errors | {"array": (high - rewards).tolist(), "arrayminus": (rewards - low).tolist()}
    figure.add_scatter(x=kls, y=rewards, error_x=x_error, error_y=y_error, mode="markers", name=label,
                       showlegend=legend, text=[run.name for run in runs],
                       marker={"color": colour, "size": 10})  # fmt: skip


def _overspend(figure: "Figure", frontier: dict[str, object]) -> None:
    """The stretch between the KL that the reward needs and the KL that was spent."""
    needed, spent, reward = frontier["kl_needed"], frontier["kl"], frontier["reward"]
    figure.add_scatter(x=[needed, spent], y=[reward, reward], mode="lines", showlegend=False,
                       name="KL spent beyond need", line={"color": RED, "width": 1.5, "dash": "dash"})  # fmt: skip
    times = overspend_cell(frontier["kl_overspend"])
    figure.add_annotation(x=(needed + spent) / 2, y=reward, text=f"overspend {times} ×", showarrow=False,
                          yshift=-12, font={"color": RED, "size": 13})  # fmt: skip


def result_chart(groups: Sequence[Group]) -> Chart:
    """Of several runs: the rewarded measure after training with its interval, and before."""
    figure = new_figure("", "")
    evaluated = [run for group in groups for run in group.runs if run.figures and "reward" in run.figures]
    labels = rewarded_labels(evaluated)
    if len(labels) > 1:
        return Chart("results", "Result of each run", "", None, DIFFERENT.format(", ".join(labels)), wide=True)
    if evaluated:
        names, before = [run.name for run in evaluated], [run.figures["reward"]["before"]["mean"] for run in evaluated]
        figure.add_scatter(x=names, y=before, mode="markers", name="original", marker={"color": GRAY, "size": 8})
        figure.update_yaxes(title={"text": labels[0]})
    for group, colour in zip(groups, colours(), strict=False):
        runs = [run for run in group.runs if run in evaluated]
        if not runs:
            continue
        after = np.array([run.figures["reward"]["after"]["mean"] for run in runs])
        low, high = np.array([run.figures["reward"]["after"]["ci95"] for run in runs]).T
        error = {"array": (high - after).tolist(), "arrayminus": (after - low).tolist(), "symmetric": False}
        figure.add_scatter(x=[run.name for run in runs], y=after.tolist(), mode="markers", name=group.name,
                           error_y=error, marker={"color": colour, "size": 9})  # fmt: skip
    figure.update_xaxes(type="category", title={"text": "run"})
    figure.update_layout(hovermode="closest", showlegend=False)
    caption = "On held-out prompts; bars are 95 % intervals over the prompts, gray is the original."
    return Chart("results", "Result of each run", caption, figure if evaluated else None, wide=True)


def measure_label(name: str, run: Run) -> str:
    """A measure's name for a reader: the classifier's probability, logit and log-odds say of which label."""
    label = run.judged_label
    if name in ("probability", "logit", "log_odds") and label:
        return f"P({label})" if name == "probability" else f"{name.replace('_', ' ')} of {label}"
    return name.replace("_", " ")


def reward_label(run: Run) -> str:
    """The rewarded measure's name for a reader."""
    return measure_label(_rewarded(run) or "", run)


def rewarded_labels(runs: Sequence[Run]) -> list[str]:
    """What these evaluated runs were rewarded by, each once."""
    return list(dict.fromkeys(map(reward_label, runs)))


def _metric(run: Run) -> str:
    return ((run.figures or {}).get("reward") or {}).get("metric", "reward/mean")


def _rewarded(run: Run) -> str | None:
    return run.figures.get("reward", {}).get("name")


def _scores(runs: Sequence[Run], side: str, name: str) -> list[float]:
    """A measure of all samples of these runs, of those that have it."""
    rows = (row[f"{side}_measures"] for run in runs for row in run.samples)
    return [digits(row[name]) for row in rows if name in row]


def _range(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    low, high = min(map(min, filter(None, values))), max(map(max, filter(None, values)))
    return (low, high) if high > low else (low - 0.5, high + 0.5)
