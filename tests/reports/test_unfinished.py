"""Reports of runs that lack something: no evaluation, a guard's end, files of an older version, damaged ones."""

import json
import re
import shutil

import pytest
import yaml
from launching import run_here

from pipeline import report, train
from pipeline.errors import BAD_SETTINGS, GUARD_STOPPED
from pipeline.reporting import write_report
from pipeline.runtime.console import Console


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, tiny_recipe):
    """A run of two steps without an evaluation, and a third step after it."""
    run = tmp_path_factory.mktemp("resumed") / "run"
    settings = ["--config", tiny_recipe, "--output_dir", run, "--evaluation_prompts", 0, "--save_every_steps", 1]
    settings += ["--learning_rate_schedule", "constant"]
    assert run_here(train.main, *settings, "--steps", 2) == 0
    assert run_here(train.main, *settings, "--steps", 3, "--resume", run) == 0
    return run


def test_a_run_without_evaluation_has_a_report_of_its_training(resumed):
    page = (resumed / "report.html").read_text()
    assert "first and last step of the training; not evaluated" in page
    told = page.count(f"Not recorded. python -m pipeline.evaluate {resumed} writes it.")
    assert told == 2, "in the places of the histograms and of the samples"
    assert page.count('class="plot"') == 9, "eight over steps and the plane"


def test_a_run_that_goes_on_adds_a_part_to_its_environment(resumed):
    parts = json.loads((resumed / "environment.json").read_text())["parts"]
    assert [(part["after_step"], part["outcome"]) for part in parts] == [(0, "finished"), (2, "finished")]
    for part in parts:
        assert part["workers"] == 1 and part["versions"]["torch"] and part["cpu"]
        assert part["started"] <= part["ended"]


def test_a_run_that_a_guard_ended_says_so(tmp_path, tiny_recipe):
    run = tmp_path / "run"
    assert run_here(train.main, "--config", tiny_recipe, "--output_dir", run, "--guard_entropy", 50) == GUARD_STOPPED
    page = (run / "report.html").read_text()
    badge = re.search(r'<span class="badge bad">(.*?)</span>', page)[1]
    assert "3 bad steps in a row" in badge and "entropy" in badge


def test_what_an_older_run_did_not_write_is_not_recorded(resumed, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(resumed, old)
    for name in ("environment.json", "finished"):
        (old / name).unlink()
    config = yaml.safe_load((old / "config.yaml").read_text())
    (old / "config.yaml").write_text(yaml.safe_dump({"steps": 5, "reward": config["reward"]}))
    with (old / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/me')  # killed while writing
    assert run_here(report.main, old) == 0
    page = (old / "report.html").read_text()
    assert "not finished: 3 of 5 steps" in page and "<dd>not recorded</dd>" in page and "core-hours" not in page


def test_a_fault_in_the_report_is_a_warning(resumed, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(resumed, damaged)
    (damaged / "evaluation.json").write_text("{")
    write_report(Console(0, enabled=True), damaged)
    assert re.search(r"warning: no report.html \(ConfigError: .*cannot be read", capsys.readouterr().out)


def test_a_directory_that_is_no_run_is_named_and_not_made(tmp_path, capsys):
    missing = tmp_path / "not" / "there"
    assert run_here(report.main, missing) == BAD_SETTINGS
    assert f"{str(missing)!r} is not a run: it has no config.yaml" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "config.yaml").touch()
    assert run_here(report.main, tmp_path) == BAD_SETTINGS
    assert "holds no settings" in capsys.readouterr().err
