"""One self-contained HTML page of a run, or of several: no network, whatever a response may contain.

Plotly's script is packed into the page (gzip and base64: 2 MB where it is 4.8) and unpacked by the browser; the page's
content policy forbids it to load anything. All text of models and settings is escaped by Jinja, set as text by the
page's script, or kept from Plotly's own tags.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from pipeline.foreign_text import plotly_text
from pipeline.reports.drawing import Chart, colours, digits
from pipeline.reports.facts import (
    comparison_table,
    differences,
    evaluation_table,
    hardware,
    headline,
    parts_table,
    settings,
    subtitle,
    time_table,
)
from pipeline.reports.outcome_charts import AGAIN, measure_label, plane_chart, result_chart, score_charts
from pipeline.reports.records import Group, Run, differing, grouped, read_run
from pipeline.reports.step_charts import step_charts
from pipeline.run_directory import REPORT_FILE

SAMPLES = 5000  # in the page; all are in evaluation_samples.jsonl
HERE = Path(__file__).parent


def write_run_page(directory: Path) -> None:
    """Write the report of the run in `directory` into it; raises `ConfigError` as `read_run` does."""
    (directory / REPORT_FILE).write_text(run_page(read_run(directory)), encoding="utf-8")


def run_page(run: Run) -> str:
    """The page of one run."""
    groups = [Group(run.name, [run])]
    shown = run.samples[:SAMPLES]
    return _rendered(
        title=run.name,
        kicker="PPO run",
        subtitle=subtitle(run),
        outcome=run.outcome,
        finished=run.finished,
        tiles=headline(run),
        key=[],
        comparison=[],
        figures=evaluation_table(run),
        outcome_charts=[plane_chart(groups), *score_charts(groups)],
        step_charts=step_charts(groups),
        samples=_samples(run, shown),
        samples_note=_samples_note(run, shown),
        times=time_table(run),
        hardware=hardware(run),
        parts=parts_table(run),
        varied=[],
        settings=settings(run),
    )


def comparison_page(runs: Sequence[Run]) -> str:
    """The page of several runs: those of the same settings are one group, with the spread of its seeds."""
    groups = grouped(runs)
    return _rendered(
        title=", ".join(group.name for group in groups) if len(groups) < 4 else f"{len(runs)} runs",
        kicker="Comparison of PPO runs",
        subtitle=f"{len(runs)} runs in {len(groups)} group{'' if len(groups) == 1 else 's'} of the same settings",
        outcome="",
        finished=True,
        tiles=[],
        key=list(zip(colours(), (group.name for group in groups), strict=False)),
        comparison=comparison_table(groups),
        figures=[],
        outcome_charts=[result_chart(groups), plane_chart(groups), *score_charts(groups)],
        step_charts=step_charts(groups),
        samples=None,
        samples_note="",
        times=[],
        hardware=[],
        parts=[],
        varied=differences(runs),
        settings=settings(runs[0], without=differing([run.config for run in runs])),
    )


def _samples(run: Run, shown: Sequence[dict[str, object]]) -> dict[str, object] | None:
    """The samples as the page's table reads them: measures by name, a list of cells a prompt."""
    if not shown:
        return None
    names = list(shown[0]["after_measures"])
    rows = [
        [
            row["prompt"],
            row["before"],
            row["after"],
            digits(row["after_kl"]),
            [digits(row["before_measures"][name]) for name in names],
            [digits(row["after_measures"][name]) for name in names],
        ]
        for row in shown
    ]
    first = names.index("probability") if "probability" in names else 0
    return {"measures": [measure_label(name, run) for name in names], "first": first, "rows": rows}


def _samples_note(run: Run, shown: Sequence[dict[str, object]]) -> str:
    if not shown:
        return AGAIN.format(run=run.directory)
    if len(shown) < len(run.samples):
        return f"The first {len(shown)} of {len(run.samples)} held-out prompts; all are in evaluation_samples.jsonl."
    return f"All {len(shown)} held-out prompts, continued by both models with the same sampling noise."


def _rendered(*, outcome_charts: list[Chart], step_charts: list[Chart], samples: object, **facts: object) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    charts = {
        chart.key: plotly_text(json.loads(chart.figure.to_json()))
        for chart in (*outcome_charts, *step_charts)
        if chart.figure
    }
    return environment.get_template("page.html").render(
        outcome_charts=outcome_charts,
        step_charts=step_charts,
        data={"charts": charts, "samples": samples},
        plotly=_packed_plotly(),
        **facts,
    )


@cache
def _packed_plotly() -> str:
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
