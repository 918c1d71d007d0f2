"""metrics.jsonl and wandb: what is written can be read back, and wandb never costs a run."""

import builtins
import getpass
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from pipeline.runtime.tracking import MetricsFile, WandbTracker

METRICS = [{"step": 1, "reward/mean": 0.25, "kl/coef": 1e-7}, {"step": 2, "reward/mean": -0.5, "kl/coef": 0.1}]


def test_each_line_of_the_metrics_file_is_a_step_and_is_there_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for count, metrics in enumerate(METRICS, start=1):
        file.write(metrics)
        assert [json.loads(line) for line in path.read_text().splitlines()] == METRICS[:count]
    file.close()


def stored_records(path: Path) -> Iterator[Record]:
    """The records of an offline run's file: LevelDB's log format of 32 KiB blocks after a header of 7 bytes."""
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def values(items) -> dict[str, object]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture
def without_login(tmp_path, monkeypatch):
    """No credentials, no settings of the user's, and a keyboard that nobody may wait for."""

    def asked(*_arguments, **_options):
        pytest.fail("wandb asked a question")

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr(getpass, "getpass", asked)
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # it keeps the settings of its first use in a process
    yield
    wandb.teardown()


def tracker(directory: Path) -> WandbTracker:
    return WandbTracker(project="a project", name="a run", config={"steps": 2}, directory=directory)


@pytest.mark.usefixtures("without_login")
def test_without_login_wandb_keeps_the_whole_run_offline_and_asks_nothing(tmp_path, capsys):
    run = tracker(tmp_path)
    for metrics in METRICS:
        run.log(metrics["step"], metrics, torch.tensor([1.0, 2.0, 2.0]))
    run.log_samples(2, [("the film", " was good", 0.75)])
    run.log_evaluation({"kl": 1.5}, [["prompt", "before", "", "after", ""], ["p", "b", "0.1", "a", "0.9"]])
    run.finish()
    wandb.teardown()  # as the program's end does: wandb's own process may write for a moment after `finish`

    assert f"kept offline under {tmp_path / 'wandb'}" in capsys.readouterr().out
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    records = list(stored_records(path))
    history = [values(record.history.item) for record in records if record.HasField("history")]
    assert [row["reward/mean"] for row in history] == [0.25, -0.5]
    assert [row["_step"] for row in history] == [1, 2]
    assert sum(history[0]["reward/histogram/values"]) == 3
    assert history[1]["samples/nrows"] == history[1]["before and after/nrows"] == 1
    (stored,) = (record.run for record in records if record.HasField("run"))
    assert (stored.project, stored.display_name) == ("a project", "a run")
    assert values(stored.config.update)["steps"] == 2
    summary = {}
    for record in records:
        summary |= values(record.summary.update)
    assert summary["evaluation"] == {"kl": 1.5}
    (table,) = path.parent.glob("files/media/table/samples*.json")
    assert json.loads(table.read_text())["data"] == [[2, "the film", " was good", 0.75]]


def test_a_wandb_that_cannot_start_only_warns(tmp_path, monkeypatch):
    def fails(*_arguments, **_options):
        raise OSError("disk full")

    monkeypatch.setattr(wandb, "init", fails)
    with pytest.warns(UserWarning, match=r"wandb could not start \(disk full\); the run goes on without it"):
        run = tracker(tmp_path)
    run.log(1, METRICS[0], torch.zeros(2))
    run.log_samples(1, [("p", "r", 0.0)])
    run.log_evaluation({"kl": 0.0}, [["prompt"]])
    run.finish()


def test_a_wandb_that_fails_later_warns_once(tmp_path, monkeypatch, recwarn):
    class Run:
        calls = 0

        def log(self, *_arguments, **_options):
            Run.calls += 1
            raise ConnectionError("gone")

    monkeypatch.setattr(wandb, "init", lambda **_options: Run())
    run = tracker(tmp_path)
    for metrics in METRICS:
        run.log(metrics["step"], metrics, torch.zeros(2))
    run.finish()
    assert Run.calls == 1
    assert [str(w.message) for w in recwarn if "wandb failed" in str(w.message)] == [
        "wandb failed (gone); the run goes on without it."
    ]


@pytest.mark.usefixtures("without_login")
def test_a_user_who_disables_wandb_is_heeded(tmp_path, monkeypatch, capsys):
    asked_for = []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(wandb, "init", lambda **options: asked_for.append(options["mode"]))
    tracker(tmp_path)
    assert asked_for in ([], [None], ["disabled"])
    assert "offline" not in capsys.readouterr().out
