"""A run of somebody else's runs no code and reaches no server unless it is trusted; what is written has no secret."""

import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from launching import run_here

from pipeline import chat, evaluate, export, report, train

SECRET, TOKEN = "sekritQueryValue", "sekritBearerToken"


@pytest.fixture
def stranger(lora_run, tmp_path, monkeypatch):
    """A run whose reward is a module of its own folder, which leaves a mark when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "stranger"
    shutil.copytree(lora_run, run)
    (run / "judge.py").write_text(
        "open('mark', 'w').close()\ndef score(prompts, responses):\n    return [0.0] * len(responses)\n"
    )
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["reward"] = ["stranger.judge:score", "http://127.0.0.1:1/score?key=sekrit"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "the", "chosen": " film", "rejected": " story"}\n' * 2)
    return run


@pytest.mark.parametrize(
    ("main", "options"),
    [(chat.main, ()), (evaluate.main, ()), (evaluate.main, ("--preferences", "pairs.jsonl"))],
    ids=["chat", "evaluate", "preferences"],
)
def test_a_run_that_runs_code_or_asks_a_server_says_which_and_waits_for_trust(
    stranger, main, options, capsys, monkeypatch
):
    monkeypatch.setenv("REWARD_TOKEN", "mine")
    monkeypatch.setattr(chat, "open_chat", lambda *_: pytest.fail("the chat was opened"))
    assert run_here(main, stranger, *options) == 2
    told = capsys.readouterr().err
    assert f"the reward of {stranger} runs the code of stranger.judge:score, which may be a file in this folder" in told
    assert "sends every text and REWARD_TOKEN to http://127.0.0.1:1/score?key=***" in told and "add --trust" in told
    assert not (stranger.parent / "mark").exists()


def test_what_loads_no_reward_needs_no_trust(stranger, capsys):
    for main, options in (
        (report.main, ()),
        (export.main, ("--what", "adapter", "--to", "out")),
        (evaluate.main, ("--judge-file", "judge.csv")),
    ):
        assert run_here(main, stranger, *options) == 0, capsys.readouterr().err
    assert not (stranger.parent / "mark").exists()


def test_a_trusted_run_and_a_reward_of_ones_own_words_go_on(stranger, capsys):
    config = stranger / "config.yaml"
    config.write_text(config.read_text().replace("- http://127.0.0.1:1/score?key=sekrit\n", ""))
    assert run_here(evaluate.main, stranger, "--trust", "--preferences", "pairs.jsonl") == 0
    assert (stranger.parent / "mark").exists()
    (stranger.parent / "mark").unlink()
    assert run_here(evaluate.main, stranger, "--reward", "sentiment", "--preferences", "pairs.jsonl") == 0
    assert not (stranger.parent / "mark").exists()


class Server(BaseHTTPRequestHandler):
    """Scores by length until it is told to fail; then it answers with what it was shown."""

    failing = False

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = json.dumps({"scores": [float(len(response)) for response in asked["responses"]]})
        body = f"refused {self.path} {self.headers['Authorization']}\x1b[2J" if Server.failing else scores
        self.send_response(400 if Server.failing else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


def test_credentials_of_a_reward_server_are_in_nothing_that_a_run_writes_or_says(
    tiny_recipe, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        reward = f"http://127.0.0.1:{server.server_port}/score?token={SECRET}"
        trackers = ("--report_to", "wandb", "tensorboard", "trackio")
        monkeypatch.setattr("sys.orig_argv", ["python", "-m", "pipeline.train", "--reward", reward])
        arguments = ("--config", tiny_recipe, "--output_dir", "run", "--steps", 1, "--reward", reward, "sentiment")
        assert run_here(train.main, *arguments, *trackers) == 0
        assert run_here(export.main, "run", "--what", "full", "--to", "exported") == 0
        assert run_here(evaluate.main, "run", "--evaluation_prompts", 4, "--reward", reward) == 0
        Server.failing = True
        try:
            assert run_here(evaluate.main, "run", "--trust") == 2
        finally:
            Server.failing = False
            server.shutdown()
    said = "".join(capfd.readouterr())
    assert "answered 400: refused /score?token=*** Bearer ***" in said and "\x1b" not in said
    assert SECRET not in said and TOKEN not in said
    places = (tmp_path, Path(os.environ["TRACKIO_DIR"]))
    files = [path for place in places for path in place.rglob("*") if path.is_file() and path.name != "config.yaml"]
    assert any(path.suffix == ".wandb" for path in files) and any(path.suffix == ".db" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes() or TOKEN.encode() in path.read_bytes()] == []
    command = json.loads((tmp_path / "run/environment.json").read_text())["parts"][0]["command"]
    assert command.endswith("score?token=***'")
    steps = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert any(name.startswith("reward/127.0.0.1_") and name.endswith("_score/raw_mean") for name in steps)
    assert "score?token=\\*\\*\\*" in (tmp_path / "exported/README.md").read_text()
