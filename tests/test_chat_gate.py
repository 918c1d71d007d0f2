"""The chat's server answers its own page only, keeps nobody's files, and shows what others wrote as text."""

import json
import os
import shutil
from pathlib import Path

import pytest
import requests
from launching import run_here

from pipeline import chat as command
from pipeline.assembly import open_run
from pipeline.chat import choose_login, launch, open_chat, parse, who_can_reach
from pipeline.chat_gate import Gate, host_of
from pipeline.chat_page import introduction, message
from pipeline.chatting import ChatError
from pipeline.checked import ConfigError


@pytest.fixture(scope="module")
def chat(lora_run):
    return open_chat(*open_run("", str(lora_run)))


@pytest.fixture(scope="module")
def served(chat, lora_run, tmp_path_factory):
    """The real server's port and the folder of its temporary files."""
    private = tmp_path_factory.mktemp("private")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(private))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        page, address = launch(chat, lora_run, port=None, share=False, login=None)
        yield int(address.rstrip("/").rpartition(":")[2]), private
        page.close(verbose=False)


def asked(port: int, path: str, method: str = "GET", **options) -> requests.Response:
    return requests.request(method, f"http://127.0.0.1:{port}{path}", timeout=10, **options)


def test_it_answers_under_its_own_names_and_port_alone(served):
    port, _ = served
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", f"LOCALHOST:{port}"):
        assert asked(port, "/config", headers={"Host": host}).status_code == 200
    for host in (f"evil.example:{port}", "127.0.0.1", "localhost:1", f"127.0.0.1.evil.example:{port}", ""):
        answer = asked(port, "/config", headers={"Host": host, "Origin": f"http://{host}"})
        assert answer.status_code in (400, 403) and "components" not in answer.text, host
    assert "served under no other name" in asked(port, "/", headers={"Host": f"evil.example:{port}"}).text
    assert asked(port, "/config", headers={"X-Forwarded-Host": "evil.example"}).status_code == 403


def test_it_answers_no_other_page_in_the_same_browser(served):
    port, _ = served
    body = {"data": ["the film", 1, 5, 1, 0], "fn_index": 1, "session_hash": "x"}
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port + 1}", f"http://localhost:{port}"):
        answer = asked(port, "/gradio_api/queue/join", "POST", json=body, headers={"Origin": origin})
        assert (answer.status_code, answer.text) == (403, "Another page asks.\n"), origin
    own = {"Origin": f"http://127.0.0.1:{port}"}
    assert asked(port, "/gradio_api/queue/join", "POST", json=body, headers=own).status_code == 200


def test_it_takes_no_files_and_no_large_requests(served, chat):
    port, private = served
    answer = asked(port, "/gradio_api/upload", "POST", files={"files": ("x.bin", b"x" * 100_000)})
    assert answer.status_code == 403 and "takes no files" in answer.text
    assert asked(port, "/gradio_api/process_recording", "POST", data=b"x").status_code == 403
    large = {"data": ["x" * 24 * 64 * 12 * 2 + "x" * 65_536], "fn_index": 1, "session_hash": "x"}
    assert asked(port, "/gradio_api/queue/join", "POST", json=large).status_code == 403
    unknown = asked(port, "/gradio_api/queue/join", "POST", data=iter([b"{}"]))  # of no stated length
    assert unknown.status_code == 403
    assert asked(port, "/config", "DELETE").status_code == 403
    assert list(private.rglob("*")) == []


def test_a_failure_inside_is_not_told_to_callers(served):
    port, _ = served
    respond = next(d["id"] for d in asked(port, "/config").json()["dependencies"] if len(d["inputs"]) == 5)
    body = {"data": [None, 1, 5, 1, 0], "fn_index": respond, "session_hash": "y"}
    assert asked(port, "/gradio_api/queue/join", "POST", json=body).status_code == 200
    with requests.get(f"http://127.0.0.1:{port}/gradio_api/queue/data?session_hash=y", stream=True, timeout=20) as told:
        events = [json.loads(line[6:]) for line in told.iter_lines(decode_unicode=True) if line.startswith("data: ")]
    (done,) = (event for event in events if event["msg"] == "process_completed")
    assert done["success"] is False and done["output"]["error"] is None
    assert asked(port, "/gradio_api/info").json()["named_endpoints"] == {}
    assert asked(port, "/monitoring/summary").status_code == 403


def test_a_public_link_has_its_own_host(chat):
    gate = Gate(None, public={host_of("https://abc.gradio.live")}, largest=10)
    headers = [
        (b"host", b"abc.gradio.live"),
        (b"origin", b"https://abc.gradio.live"),
        (b"x-forwarded-host", b"abc.gradio.live"),
    ]
    scope = {"type": "http", "method": "GET", "path": "/", "server": ("127.0.0.1", 7860), "headers": headers}
    assert gate.fault(scope) is None
    assert gate.fault(scope | {"headers": [(b"host", b"abd.gradio.live")]}) is not None
    assert gate.fault(scope | {"headers": [*headers, (b"host", b"127.0.0.1:7860")]}) is not None, "two names"


def test_a_login_is_asked_for_before_anything(chat, lora_run):
    login = choose_login("me:se:cret", asked=False, share=True)
    assert login == ("me", "se:cret")
    page, address = launch(chat, lora_run, port=None, share=False, login=login)
    try:
        port = int(address.rstrip("/").rpartition(":")[2])
        assert asked(port, "/config").status_code == asked(port, "/gradio_api/info").status_code == 401
        body = {"data": ["the film", 1, 5, 1, 0], "fn_index": 1, "session_hash": "x"}
        assert asked(port, "/gradio_api/queue/join", "POST", json=body).status_code == 401
        wrong = asked(port, "/login", "POST", data={"username": "me", "password": "secret"})
        right = asked(port, "/login", "POST", data={"username": "me", "password": "se:cret"})
        assert (wrong.status_code, right.status_code) == (400, 200)
        assert asked(port, "/config", cookies=right.cookies).status_code == 200
    finally:
        page.close(verbose=False)


def test_who_can_reach_the_page_is_told_and_sharing_needs_a_login(monkeypatch):
    monkeypatch.delenv("CHAT_AUTH", raising=False)
    with pytest.raises(ConfigError, match=r"--share lets everybody .* add --auth"):
        choose_login(None, asked=False, share=True)
    with pytest.raises(ConfigError, match="CHAT_AUTH is not of the form user:password"):
        choose_login("secret", asked=True, share=False)
    assert choose_login(None, asked=False, share=False) is None
    assert "Every user of this machine can open it" in who_can_reach(None, share=False)
    user, password = choose_login(None, asked=True, share=True)
    assert len(password) >= 16 and password != choose_login(None, asked=True, share=True)[1]
    assert who_can_reach((user, password), share=True) == (
        f"Everybody who has the address is asked to log in. User: {user}, and password: {password}"
    )
    monkeypatch.setenv("CHAT_AUTH", "me:secret")
    assert "secret" not in who_can_reach(("me", "secret"), share=False)
    assert parse(["run"]).auth is False and parse(["run", "--auth"]).auth is True


def test_temporary_files_are_in_a_folder_of_ones_own_that_goes_with_the_server(chat, lora_run, monkeypatch, capsys):
    seen = {}

    class Ended(Exception):
        pass

    class Page:
        def block_thread(self):
            private = Path(os.environ["GRADIO_TEMP_DIR"])
            seen["private"], seen["mode"] = private, private.stat().st_mode & 0o777
            raise Ended

    monkeypatch.setattr(command, "launch", lambda *_a, **_k: (Page(), "http://127.0.0.1:1/"))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/tmp/gradio")
    with pytest.raises(Ended):
        command.serve(chat, lora_run, port=None, share=False, login=None)
    assert seen["mode"] == 0o700 and not seen["private"].exists() and seen["private"] != Path("/tmp/gradio")
    assert "Every user of this machine can open it" in capsys.readouterr().out


def test_a_huge_opening_is_refused_unread(chat, monkeypatch):
    assert chat.longest_opening == 24 * 64
    monkeypatch.setattr(chat, "tokenizer", None)  # not asked
    with pytest.raises(ChatError, match="has 10000000 characters, and the model reads 1536 at the very most"):
        next(chat.continue_opening("x" * 10_000_000, temperature=1.0, tokens=1, samples=1))


def test_settings_and_faults_are_text_on_the_page(chat, lora_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    hostile = "http://h/a<b>![p](http://evil.example/q.png)?token=sekrit"
    with (run / "config.yaml").open("a") as file:
        file.write(f"reward: ['{hostile}']\n")
    chat.config.reward.reward[:], before = [hostile], list(chat.config.reward.reward)
    shown = introduction(chat, run)
    chat.config.reward.reward[:] = before
    assert (
        "<b>" not in shown and "sekrit" not in shown and "a&lt;b&gt;![p](http://evil.example/q.png)?token=***" in shown
    )
    assert "\x1b" not in message("\x1b[2J http://u:p@h/") and "u:p" not in message("http://u:p@h/")
    assert run_here(command.main, run) == 2, "and the run asks for --trust"
