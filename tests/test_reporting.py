"""What rank zero tells of a run."""

import json
import re

import pytest
import torch
from launching import run_here
from test_config import default_config

from pipeline import train
from pipeline.metrics import Sample, StepReport
from pipeline.reporting import SHOWN, Reporter

METRICS = {metric: 1.0 for metric, _form in SHOWN.values()}


def report(step: int, parts: tuple[str, ...] = ("sentiment",), **metrics: float) -> StepReport:
    scores = torch.full((4,), float(step))
    sample = Sample("the film", " was good", float(step), dict.fromkeys(parts, 0.5), 0.25)
    return StepReport(step, METRICS | metrics, scores, dict.fromkeys(parts, scores), [sample])


def test_a_quiet_run_prints_its_outcome_and_no_more(tmp_path, tiny_recipe, capfd):
    assert run_here(train.main, "--config", tiny_recipe, "--output_dir", tmp_path / "run", "--quiet", "true") == 0
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    before, after = (figures["reward"][side]["mean"] for side in ("before", "after"))
    assert capfd.readouterr() == (
        f"logit {before:.3f} before, {after:.3f} after, at a KL of {figures['kl']:.2f} nats: {tmp_path / 'run'}\n",
        "",
    )


def test_a_resumed_run_is_drawn_from_its_first_step(tmp_path, terminal):
    config = default_config(output_dir=str(tmp_path), steps=3)
    with Reporter(config, enabled=True) as reporter:
        reporter.step(report(1, **{"reward/mean": 0.5}))
        reporter.step(report(2, **{"reward/mean": float("nan")}))
        state = reporter.state()
    with terminal, Reporter(config, enabled=True, resumed=state) as reporter:
        reporter.step(report(3, **{"reward/mean": 2.0}))
    assert re.search(r"reward +▁█ +\+2\.000 first \+0\.500", terminal.text())
    assert [json.loads(line)["reward/mean"] for line in (tmp_path / "metrics.jsonl").open()] == [0.5, None, 2.0]


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        ({}, {"KL": "guard 40", "entropy": "guard 0.40"}),
        ({"kl_adaptive": True, "kl_target": 4.5}, {"KL": "target 4.5", "entropy": "guard 0.40"}),
        ({"guard_kl": None, "guard_entropy": None}, {"KL": "", "entropy": ""}),
    ],
)
def test_figures_stand_beside_what_they_are_held_against(tmp_path, monkeypatch, settings, notes):
    shown = {}
    with Reporter(default_config(output_dir=str(tmp_path), steps=3, **settings), enabled=True) as reporter:
        monkeypatch.setattr(reporter.console, "step", lambda step, figures, left: shown.update(figures))
        reporter.step(report(1, **{"ppo/entropy": 2.0}))
        reporter.step(report(2, **{"ppo/entropy": 1.0}))
    assert shown["KL"] == ("1.00", notes["KL"]) and shown["entropy"] == ("1.00", notes["entropy"])


def test_samples_name_the_parts_of_a_reward_that_has_several(tmp_path, capsys):
    config = default_config(output_dir=str(tmp_path), steps=1)
    for parts, given in ((("sentiment",), "[+1.00]"), (("a", "b"), "[+1.00  a +0.50  b +0.50]")):
        with Reporter(config, enabled=True) as reporter:
            reporter.step(report(1, parts))
        assert f"the film | was good  {given}" in capsys.readouterr().out


def test_other_ranks_write_and_say_nothing(tmp_path, capfd):
    config = default_config(output_dir=str(tmp_path / "run"), report_to=["tensorboard"])
    with Reporter(config, enabled=False) as reporter:
        reporter.step(report(1))
        reporter.finished()
    assert capfd.readouterr() == ("", "") and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("precision", "said"), [("no", 1), ("bf16", 0)])
def test_a_first_ratio_that_float32_cannot_explain_is_warned_of_once(tmp_path, capfd, precision, said):
    with Reporter(default_config(output_dir=str(tmp_path), steps=4, mixed_precision=precision), enabled=True) as run:
        for step, deviation in enumerate((9e-4, 2e-3, 3e-3), 1):
            run.step(report(step, **{"ppo/first_minibatch_ratio_deviation": deviation}))
    told = "".join(capfd.readouterr())
    assert told.count("before any update the ratio of new to old probabilities is 0.002 off 1") == said
    assert told.count("round products to TF32 (") == said
