"""A reward served over HTTP, by a real server on the loopback interface."""

import itertools
import json
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.rewards import remote
from pipeline.rewards.protocol import RewardError, checked_scores
from pipeline.rewards.remote import RemoteReward

CUT_SHORT = 206  # of the answers below: the connection breaks before their end


class Server(ThreadingHTTPServer):
    """Answers with the number of characters of each response, or with what stands in `answers`, one a request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []
        self.answers: list[tuple[int, str]] = []
        self.slow = threading.Event()  # set: never answer
        self.headers: list[dict[str, str]] = []  # of each request
        self.more: dict[str, str] = {}  # headers of the answers
        self.pieces: Iterable[bytes] = ()  # of an answer, after its head; may have no end

    def handle_error(self, request, client_address):
        """An asker that gave up is no fault here."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.headers.append(dict(self.headers))
        if self.server.pieces:
            self.wfile.write(b"HTTP/1.0 200 OK\r\n")
            for piece in self.server.pieces:
                self.wfile.write(piece)
            return
        if self.server.slow.is_set():
            threading.Event().wait(1)
        scores = {"scores": [float(len(response)) for response in asked["responses"]]}
        status, body = self.server.answers.pop(0) if self.server.answers else (200, json.dumps(scores))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + (status == CUT_SHORT)))
        if status == 429:
            self.send_header("Retry-After", "3600")
        for name, value in self.server.more.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def test_texts_go_out_in_batches_and_scores_come_back_in_order(server):
    reward = RemoteReward(server.url, batch_size=2, timeout=5)
    assert checked_scores(reward, ["p", "q", "r"], ["a", "bé\n", ""]).tolist() == [1.0, 3.0, 0.0]
    assert server.asked == [{"prompts": ["p", "q"], "responses": ["a", "bé\n"]}, {"prompts": ["r"], "responses": [""]}]


def test_a_server_that_is_busy_for_a_moment_is_asked_again(server):
    server.answers = [(503, "loading"), (500, "oops")]
    assert RemoteReward(server.url, batch_size=8, timeout=5)(["p"], ["four"]) == [4.0]
    assert len(server.asked) == 3


def test_an_answer_that_breaks_off_is_asked_for_again(server):
    server.answers = [(CUT_SHORT, '{"scores": [4')]
    assert RemoteReward(server.url, batch_size=8, timeout=5)(["p"], ["four"]) == [4.0]
    assert len(server.asked) == 2


def test_a_server_that_names_a_time_is_waited_for_but_not_for_an_hour(server, monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    server.answers = [(429, "busy"), (503, "loading")]
    assert RemoteReward(server.url, batch_size=8, timeout=5)(["p"], ["four"]) == [4.0]
    assert slept == [60.0, 0.0]


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/", "http://127.0.0.1:99999/x"])
def test_what_is_no_address_is_said_at_once(url):
    with pytest.raises(RewardError, match=f"{url} is no address") as caught:
        RemoteReward(url, batch_size=8, timeout=5)(["p"], ["r"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "body", "fault"),
    [
        (404, "no such model", "answered 404: no such model"),
        (422, "prompts missing", "answered 422: prompts missing"),
        (200, "<html>", "is expected"),
        (200, "[1.0]", "is expected"),
        (200, '{"score": [1.0]}', "is expected"),
        (200, '{"scores": [1.0, 2.0]}', "gave 2 scores for 1 responses"),
        (200, '{"scores": 1.0}', "gave 1.0 for 1 responses"),
        (200, '{"scores": ["high"]}', "not numbers"),
        (200, '{"scores": [NaN]}', "must be finite"),
        (200, f'{{"scores": [{"9" * 400}]}}', "not numbers"),
        (404, "<html>\n<body>nothing", "answered 404: <html> <body>nothing"),
    ],
)
def test_an_answer_that_is_none_is_an_error_that_quotes_it(server, status, body, fault):
    server.answers = [(status, body)]
    with pytest.raises(RewardError) as caught:
        checked_scores(RemoteReward(server.url, batch_size=8, timeout=5), ["p"], ["r"])
    assert fault in str(caught.value)


def test_a_server_that_stays_down_is_named_after_all_tries(server):
    server.answers = [(503, "loading")] * 3
    with pytest.raises(RewardError, match="answered 503: loading"):
        RemoteReward(server.url, batch_size=8, timeout=5)(["p"], ["r"])
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(RewardError, match=f"{url} did not answer in 3 tries"):
        RemoteReward(url, batch_size=8, timeout=5)(["p"], ["r"])


def test_a_server_that_hangs_is_given_up(server):
    server.slow.set()
    with pytest.raises(RewardError, match=r"reward_timeout=0\.1 seconds"):
        RemoteReward(server.url, batch_size=8, timeout=0.1)(["p"], ["r"])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_named_and_not_followed(server, status):
    server.more = {"Location": "http://127.0.0.1:1/elsewhere?token=sekrit"}
    server.answers = [(status, "")]
    with pytest.raises(RewardError, match=rf"answered {status}, a redirect to http://127.0.0.1:1/elsewhere"):
        RemoteReward(server.url, batch_size=8, timeout=5)(["p"], ["r"])
    assert len(server.asked) == 1


def test_of_credentials_only_the_token_that_is_meant_for_it_is_sent(server, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login wbuser password NETRC-SECRET\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    RemoteReward(server.url, batch_size=8, timeout=5)(["p"], ["r"])
    assert "Authorization" not in server.headers[0] and server.headers[0]["Accept-Encoding"] == "identity"
    monkeypatch.setenv("REWARD_TOKEN", "abc123sekrit")
    RemoteReward(server.url, batch_size=8, timeout=5)(["p"], ["r"])
    assert server.headers[1]["Authorization"] == "Bearer abc123sekrit"
    monkeypatch.setenv("REWARD_TOKEN", "abc\r\nHost: x")
    with pytest.raises(RewardError, match="REWARD_TOKEN holds what no HTTP header can"):
        RemoteReward(server.url, batch_size=8, timeout=5)


def test_a_message_quotes_a_server_without_the_secrets_that_it_was_shown(server, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "abc123sekrit")
    reward = RemoteReward(f"{server.url}?key=queryvalue&model=large", batch_size=8, timeout=5)
    server.answers = [(400, "no such key=queryvalue&model=large (Bearer abc123sekrit), queryvalue")]
    with pytest.raises(RewardError) as caught:
        reward(["p"], ["r"])
    assert str(caught.value).endswith("answered 400: no such key=***&model=*** (Bearer ***), ***")
    server.shutdown()
    server.server_close()
    with pytest.raises(RewardError) as caught:
        reward(["p"], ["r"])
    assert "queryvalue" not in str(caught.value).replace(reward.url, "")


@pytest.mark.parametrize("head", [b"\r\n", b""], ids=["in its body", "in its head"])
def test_an_answer_that_never_ends_is_given_up_in_time(server, monkeypatch, head):
    def dripping():
        yield head
        while True:
            time.sleep(0.05)
            yield b" "

    monkeypatch.setattr(remote, "CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(remote, "WAITS", ())
    server.pieces = dripping()
    began = time.monotonic()
    with pytest.raises(RewardError, match="the answer was not whole"):
        RemoteReward(server.url, batch_size=8, timeout=0.2)(["p"], ["r"])
    assert time.monotonic() - began < 2


def test_an_answer_without_end_does_not_fill_the_memory(server):
    sent = itertools.count()
    server.pieces = itertools.chain([b"\r\n"], (b"1" * 65536 for _ in sent))
    with pytest.raises(RewardError, match="answers 1 responses with more than 1000064 bytes"):
        RemoteReward(server.url, batch_size=8, timeout=5)(["p"], ["r"])
    assert len(server.asked) == 1 and next(sent) < 300  # what lies in the sockets' buffers included


def test_a_packed_answer_is_refused(server):
    server.more = {"Content-Encoding": "gzip"}
    with pytest.raises(RewardError, match=r"packs its answer \(gzip\)"):
        RemoteReward(server.url, batch_size=8, timeout=5)(["p"], ["r"])
