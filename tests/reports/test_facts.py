"""Small runs made by hand: groups, series, cost and spread."""

from pathlib import Path

import pytest

from pipeline.reports.facts import comparison_table, duration, time_table, wall_seconds
from pipeline.reports.outcome_charts import plane_chart, result_chart, score_charts
from pipeline.reports.records import Run, grouped
from pipeline.reports.step_charts import POINTS, over_seeds, series


def run(name="run", *, steps=(), parts=(), figures=None, **config) -> Run:
    return Run(Path(name), name, config, list(steps), figures, [], list(parts), True)


def part(after_step, *, workers, device="cpu", threads=1, minutes=1):
    started, ended = "2026-01-01T00:00:00+00:00", f"2026-01-01T00:{minutes:02}:00+00:00"
    return {"after_step": after_step, "workers": workers, "device": device, "threads_per_worker": threads,
            "started": started, "ended": ended, "outcome": "finished"}  # fmt: skip


def test_runs_that_differ_in_their_seed_alone_are_a_group_and_others_are_named_by_what_differs():
    runs = [run("a", kl_coef=0.1, seed=0, output_dir="a"), run("b", kl_coef=0.1, seed=1, output_dir="b"),
            run("c", kl_coef=0.2, seed=0, output_dir="c")]  # fmt: skip
    assert [(group.name, [r.name for r in group.runs]) for group in grouped(runs)] == [
        ("kl_coef=0.1 (2 seeds)", ["a", "b"]),
        ("c", ["c"]),
    ]
    assert [group.name for group in grouped(runs[:2])] == ["all runs (2 seeds)"]


def test_a_long_series_is_averaged_and_what_was_no_number_is_left_out():
    steps = [{"step": i + 1, "x": float(i)} for i in range(2 * POINTS)]
    steps[0]["x"] = None
    numbers, values = series(run(steps=steps), "x")
    assert len(numbers) == len(values) == POINTS and numbers[:2] == [2, 4] and values[:2] == [1.0, 2.5]
    assert series(run(steps=steps), "y") == ([], [])


def test_the_spread_of_seeds_is_over_those_that_have_the_step():
    lines = [([1, 2], [1.0, 5.0]), ([1], [3.0]), ([1, 2], [8.0, None])]
    assert over_seeds(lines) == ([1, 2], [1.0, 5.0], [4.0, 5.0], [8.0, 5.0])


def test_cost_is_time_times_the_workers_of_the_part_that_took_the_step():
    steps = [{"step": i + 1, "time/step_seconds": 900.0, "time/update_seconds": 360.0} for i in range(4)]
    cores = run(steps=steps, parts=[part(0, workers=2, threads=4), part(2, workers=1, threads=1, minutes=59)])
    rows = {row[0]: row[1:] for row in time_table(cores)}
    assert rows["phase"][-1] == "core-hours"
    assert rows["updates"] == ["24:00", "40.0%", f"{0.1 * 2 * 8 + 0.1 * 2 * 1:.4f}"]
    assert rows["all steps"] == ["1:00:00", "100.0%", f"{0.25 * 2 * 8 + 0.25 * 2:.4f}"]
    assert rows["start to end"][0] == "1:00:00" and rows["loading, checkpoints, evaluation"][0] == "0.0 s"
    gpus = run(steps=steps, parts=[part(0, workers=2, device="cuda", threads=8)])
    assert {row[0]: row[-1] for row in time_table(gpus)}["all steps"] == "2.0000"
    assert wall_seconds(run(parts=[part(2, workers=1)])) is None, "its first steps were taken elsewhere"
    assert wall_seconds(run(parts=[part(0, workers=1) | {"ended": None}])) is None, "it was killed"


def test_the_table_of_several_runs_ends_a_group_with_mean_deviation_and_range():
    def figures(mean, kl):
        side = {"probability": {"mean": mean, "median": mean, "ci95": [mean - 0.01, mean + 0.01]}, "distinct_2": 0.5,
                "perplexity": 80.0}  # fmt: skip
        return {"before": side, "after": side, "kl": kl, "kl_ci95": [kl, kl]}

    runs = [run(str(i), figures=figures(mean, kl), seed=i, reward_label="POSITIVE")
            for i, (mean, kl) in enumerate([(0.8, 4.0), (0.9, 6.0)])]  # fmt: skip
    rows = comparison_table(grouped(runs))
    assert rows[0][1][2] == "P(POSITIVE) after" and rows[1][1][2:4] == ["0.800 (0.790 to 0.810)", "4.00"]
    spread, cells = rows[-1]
    assert spread and cells[2:4] == ["0.850 ± 0.071 (0.800 to 0.900)", "5.00 ± 1.41 (4.00 to 6.00)"]


def test_runs_rewarded_by_different_labels_share_no_column_and_no_axis():
    def judged(name, mean, **config):
        side = {"mean": mean, "median": mean, "ci95": [mean, mean]}
        texts = {"distinct_2": 0.5, "perplexity": 80.0}
        figures = {"before": {"probability": side, **texts}, "after": {"probability": side, **texts}, "kl": 1.0,
                   "kl_ci95": [1.0, 1.0], "reward": {"name": "probability", "before": side, "after": side}}  # fmt: skip
        row = {"before_measures": {"probability": mean}, "after_measures": {"probability": mean}}
        return Run(Path(name), name, config, [], figures, [row] * 4, [], True)

    runs = [judged("a", 0.25, reward=["sentiment"], reward_label="POSITIVE"),
            judged("b", 0.75, reward=["classifier:some/where:NEGATIVE=-1"], reward_label="POSITIVE"),
            judged("c", 0.5, reward=["sentiment"], reward_label="NEGATIVE")]  # fmt: skip
    rows = [cells for _, cells in comparison_table(grouped(runs))]
    assert [row[2].partition(" (")[0] for row in rows] == [
        "evaluation after", "P(POSITIVE) 0.250", "P(NEGATIVE) 0.750", "P(NEGATIVE) 0.500",
    ]  # fmt: skip
    for chart in (plane_chart(grouped(runs)), result_chart(grouped(runs))):
        assert chart.figure is None and "P(POSITIVE), P(NEGATIVE)" in chart.missing
    charts = {chart.title: chart for chart in score_charts(grouped(runs))}
    assert list(charts) == ["P(POSITIVE), before and after", "P(NEGATIVE), before and after"]
    positive, negative = ([[*trace.x] for trace in chart.figure.data] for chart in charts.values())
    assert positive == [[0.25] * 4] * 2 and negative == [[0.75] * 4, [0.75] * 4, [0.5] * 4]
    assert plane_chart(grouped(runs[1:])).figure is not None


@pytest.mark.parametrize("seconds, told", [(0.04, "0.0 s"), (59.94, "59.9 s"), (192.4, "3:12"), (3723, "1:02:03")])
def test_durations_are_told_as_people_write_them(seconds, told):
    assert duration(seconds) == told
