"""metrics.jsonl, wandb, TensorBoard and Trackio: what a real run stored is read back, and no tracker costs a run."""

import builtins
import getpass
import json
import os
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import trackio
import wandb
import yaml
from launching import metrics, run_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from pipeline import train
from pipeline.runtime.tracking import MetricsFile, Trackers
from pipeline.trainer import PPOTrainer

METRICS = [{"step": 1, "reward/mean": 0.25, "kl/coef": 1e-7}, {"step": 2, "reward/mean": -0.5, "kl/coef": 0.1}]
PARTS = ["sentiment", "repetition"]
HELD_OUT = 5  # of the tiny reviews


def test_each_line_of_the_metrics_file_is_a_step_and_is_there_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for count, row in enumerate(METRICS, start=1):
        file.write(row)
        assert [json.loads(line) for line in path.read_text().splitlines()] == METRICS[:count]
    file.close()


def stored_records(path: Path) -> Iterator[Record]:
    """The records of an offline run's file: LevelDB's log format of 32 KiB blocks after a header of 7 bytes.

    wandb has no reader in Python any more.
    """
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


def without_login(patch: pytest.MonkeyPatch, home: Path) -> None:
    """No credentials, no settings of the user's, and a keyboard that nobody may wait for."""

    def asked(*_arguments, **_options):
        pytest.fail("a tracker asked a question")

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_DISABLED"):
        patch.delenv(name, raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        patch.setenv(name, str(home))
    patch.setattr(builtins, "input", asked)
    patch.setattr(getpass, "getpass", asked)


@pytest.fixture
def no_login(tmp_path, monkeypatch):
    without_login(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # it keeps the settings of its first use in a process
    yield
    wandb.teardown()


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, tiny_recipe):
    """A run of three steps, reported to all three and cut off after the second, whose checkpoint is lost.

    So the second step is gone through twice. Returns its directory and the addresses that were connected to.
    """
    root = tmp_path_factory.mktemp("tracked")
    command = ["--config", tiny_recipe, "--output_dir", root / "run", "--save_every_steps", "1", "--wandb_log_model"]
    command += ["--report_to", "wandb", "tensorboard", "trackio", "--reward", *PARTS]
    draw, connect, connected = PPOTrainer.draw_prompts, socket.socket.connect, []

    def interrupted(self, step):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return draw(self, step)

    def noted(self, address):
        connected.append(address)
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        without_login(patch, root / "home")
        patch.setattr(socket.socket, "connect", noted)
        wandb.teardown()
        with patch.context() as cut_off:
            cut_off.setattr(PPOTrainer, "draw_prompts", interrupted)
            assert run_here(train.main, *command) == 128 + signal.SIGTERM
        (root / "run/checkpoints/step_000002/optimizer.bin").write_bytes(b"")
        assert run_here(train.main, *command) == 0
        wandb.teardown()  # as the program's end does: wandb's own process may write for a moment after `finish`
    return root / "run", connected


def test_nothing_but_this_machine_was_connected_to(tracked):
    for address in tracked[1]:
        assert not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost"), address


def test_wandb_stored_the_run_offline_under_one_id(tracked):
    paths = sorted(tracked[0].glob("wandb/offline-run-*/run-*.wandb"))
    parts = [list(stored_records(path)) for path in paths]
    runs = [record.run for records in parts for record in records if record.HasField("run")]
    assert len(parts) == 2 and len({run.run_id for run in runs}) == 1
    assert {(run.project, run.display_name) for run in runs} == {("rlhf-ppo", "run")}
    assert values(runs[0].config.update)["learning_rate"] == 1e-3
    histories = [[values(record.history.item) for record in records if record.HasField("history")] for records in parts]
    assert [[row["_step"] for row in rows] for rows in histories] == [[1, 2], [2, 3]]
    for row, logged in zip([histories[0][0], *histories[1]], metrics(tracked[0]), strict=True):
        assert {name: row[name] for name in logged} == logged  # every metric under its own name
        for name in ("reward/histogram", *(f"reward/{part}/histogram" for part in PARTS)):
            assert sum(row[f"{name}/values"]) == 16, "a rollout batch"


def test_wandbs_table_of_samples_grew_over_the_interruption(tracked):
    tables = {}
    for path in tracked[0].glob("wandb/offline-run-*/files/media/table/samples_*.json"):
        table = json.loads(path.read_text())
        tables[len(table["data"])] = table
    table = tables[max(tables)]
    assert table["columns"] == ["step", "prompt", "response", "reward", "reward/sentiment", "reward/repetition", "KL"]
    assert [row[0] for row in table["data"]] == [1, 1, 2, 2, 3, 3]
    for _step, prompt, _response, reward, sentiment, repetition, kl in table["data"]:
        assert prompt and reward == pytest.approx(sentiment + repetition) and abs(kl) < 5


def test_wandb_has_the_comparison_and_the_model(tracked):
    evaluation = json.loads((tracked[0] / "evaluation.json").read_text())
    *_, last = sorted(tracked[0].glob("wandb/offline-run-*/run-*.wandb"))
    records = list(stored_records(last))
    summary = {}
    for record in records:
        summary |= values(record.summary.update)
    assert summary["evaluation"]["kl"] == evaluation["kl"] and summary["evaluation"]["after"] == evaluation["after"]
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in last.parent.rglob("*.table.json")}
    assert tables["figures"]["columns"] == [f"{HELD_OUT} held-out prompts", "before", "after"]
    assert (
        len(tables["before and after"]["data"]) == HELD_OUT and tables["before and after"]["columns"][-1] == "KL after"
    )
    (artifact,) = (record.artifact for record in records if record.artifact.type == "model")
    files = {entry.path for entry in artifact.manifest.contents}
    assert artifact.name == "run" and files >= {"model.safetensors", "tokenizer.json", "config.yaml", "evaluation.json"}


def test_tensorboard_shows_each_step_once(tracked):
    events = EventAccumulator(str(tracked[0] / "tensorboard"), size_guidance={"tensors": 0, "histograms": 0})
    events.Reload()
    for name in ("reward/mean", "kl/sequence_k1", "reward/repetition/raw_mean"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in metrics(tracked[0])]
    assert [event.step for event in events.Histograms("reward/histogram")] == [1, 2, 3]
    evaluation = json.loads((tracked[0] / "evaluation.json").read_text())
    (mean,) = events.Scalars("evaluation/after/probability/mean")
    assert mean.value == pytest.approx(evaluation["after"]["probability"]["mean"])
    texts = {
        name: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{name}/text_summary")]
        for name in ("samples", "before and after", "evaluation/figures")
    }
    assert texts["samples"][-1].startswith("| step | prompt | response | reward |")
    assert {event.step for event in events.Tensors("samples/text_summary")} == {1, 2, 3}
    assert (
        texts["before and after"][0].count("\n") == HELD_OUT + 1
        and "held-out prompts" in texts["evaluation/figures"][0]
    )
    (settings,) = (tracked[0] / "tensorboard").glob("*/hparams.yml")
    assert yaml.safe_load(settings.read_text())["learning_rate"] == 1e-3


def test_trackio_stored_each_step_once_in_one_run(tracked):
    (run,) = [run for run in trackio.Api().runs("rlhf-ppo") if run.name.startswith("run-")]
    assert run.config["learning_rate"] == 1e-3
    logs = trackio.SQLiteStorage.get_logs("rlhf-ppo", run.name, run_id=run.id)
    scalars = [row for row in logs if "reward/mean" in row]
    logged = metrics(tracked[0])
    assert [(row["step"], row["reward/mean"]) for row in scalars] == [(r["step"], r["reward/mean"]) for r in logged]
    assert set(logged[0]) - set(scalars[0]) == set()
    assert sum(scalars[0]["reward/repetition/histogram"]["values"]) == 16
    tables = [row["samples"]["_value"] for row in logs if "samples" in row]
    assert len(tables) == 4 and tables[-1][0]["step"] == 3 and len(tables[-1]) == 2
    (compared,) = [row["before and after"]["_value"] for row in logs if "before and after" in row]
    assert len(compared) == HELD_OUT
    (figures,) = [row for row in logs if "evaluation/kl" in row]
    assert figures["evaluation/kl"] == json.loads((tracked[0] / "evaluation.json").read_text())["kl"]


def trackers(names: list[str], directory: Path, said: list[str], warned: list[str], state=None) -> Trackers:
    return Trackers(
        names,
        project="a-project",
        name="a run",
        config={"steps": 2},
        directory=directory,
        say=said.append,
        warn=warned.append,
        state=state,
    )


def log_all(run: Trackers) -> None:
    for row in METRICS:
        run.log(row["step"], row, {"reward/histogram": torch.tensor([1.0, 2.0, 2.0])})
    run.samples(["prompt", "reward"], [["the film", 0.75]])
    run.summary("evaluation", {"kl": 1.5})
    run.finish(failed=False)


@pytest.mark.usefixtures("no_login")
def test_a_user_hears_once_where_the_run_is_kept(tmp_path, capfd):
    said, warned = [], []
    log_all(trackers(["wandb", "tensorboard", "trackio"], tmp_path, said, warned))
    assert warned == [] and capfd.readouterr() == ("", "")
    assert f"kept offline under {tmp_path / 'wandb'}" in said[0]
    assert said[1:] == [
        f"tensorboard: `tensorboard --logdir {tmp_path / 'tensorboard'}` shows the run.",
        "trackio: `trackio show --project a-project` shows the run.",
    ]


def test_a_run_cut_off_before_its_first_checkpoint_is_still_one_run(tmp_path):
    names, warned = ["tensorboard", "trackio"], []
    first = trackers(names, tmp_path, [], warned)
    state = first.state()
    log_all(first)
    log_all(trackers(names, tmp_path, [], warned, state))
    assert warned == [] and len(list(tmp_path.glob("tensorboard/*/hparams.yml"))) == 1
    (run,) = [run for run in trackio.Api().runs("a-project") if run.name == f"a run-{state['id']}"]
    logs = trackio.SQLiteStorage.get_logs("a-project", run.name, run_id=run.id)
    assert [row["step"] for row in logs if "reward/mean" in row] == [1, 2]


@pytest.mark.usefixtures("no_login")
def test_a_failed_run_is_marked_as_such_in_wandb(tmp_path):
    run = trackers(["wandb"], tmp_path, [], [])
    run.finish(failed=True)
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    (end,) = (record.exit for record in stored_records(path) if record.HasField("exit"))
    assert end.exit_code == 1


def test_a_tracker_that_cannot_start_only_warns_and_the_others_go_on(tmp_path, monkeypatch):
    def fails(*_arguments, **_options):
        raise OSError("disk full")

    monkeypatch.setattr(wandb, "init", fails)
    warned = []
    log_all(trackers(["wandb", "tensorboard"], tmp_path, [], warned))
    assert warned == ["wandb could not start (disk full); the run goes on without it."]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2]


def test_a_tracker_that_fails_later_warns_once(tmp_path, monkeypatch):
    class Run:
        calls = 0

        def log(self, *_arguments, **_options):
            Run.calls += 1
            raise ConnectionError("gone")

    monkeypatch.setattr(wandb, "init", lambda **_options: Run())
    warned = []
    log_all(trackers(["wandb"], tmp_path, [], warned))
    assert Run.calls == 1 and warned == ["wandb failed (gone); the run goes on without it."]


@pytest.mark.usefixtures("no_login")
def test_a_user_who_disables_wandb_is_heeded(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    said, warned = [], []
    run = trackers(["wandb"], tmp_path, said, warned)
    run.model([Path(__file__)])
    log_all(run)
    assert said == warned == [] and set(os.listdir(tmp_path)) <= {"home"}
