"""A reward model served elsewhere, asked over HTTP."""

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

import requests
from requests.exceptions import InvalidSchema, InvalidURL
from urllib3.exceptions import HTTPError

from pipeline.foreign_text import HIDDEN, masked_query
from pipeline.rewards.protocol import RewardError, short
from pipeline.rewards.terms import TOKEN_VARIABLE

WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds, after each try that failed but the last
LONGEST_WAIT = 60.0  # whatever a server's Retry-After says
BUSY = (429, 500, 502, 503, 504)
CONNECT_SECONDS = 10.0
BYTES_A_SCORE, OTHER_BYTES = 64, 1_000_000  # what an answer may have, at most
HIDDEN_FROM = 6  # characters; a shorter value of a query stands in messages by chance


@dataclass(frozen=True)
class Answer:
    """What came back, read to its end."""

    status: int
    headers: requests.structures.CaseInsensitiveDict
    text: str


class RemoteReward:
    """Posts {"prompts": […], "responses": […]} as JSON and takes {"scores": […]}, a number each, in the same order.

    Connections that fail or break, time-outs and the answers 429, 500, 502, 503 and 504 are tried again (a server's
    Retry-After in seconds is heeded, up to a minute). Redirects are not followed. Of the environment's credentials only
    `REWARD_TOKEN` is sent, as `Authorization: Bearer …`; its proxies and certificate authorities are heeded.
    """

    def __init__(self, url: str, *, batch_size: int, timeout: float):
        """
        Args:
            batch_size: texts a request.
            timeout: seconds for which the server may be silent, each time. The whole answer must be there within twice
                that and the ten seconds that connecting may take.
        """
        self.url, self.batch_size, self.timeout = url, batch_size, timeout
        self._token = os.environ.get(TOKEN_VARIABLE, "")
        if not self._token.isascii() or not self._token.isprintable():
            raise RewardError(f"{TOKEN_VARIABLE} holds what no HTTP header can: line breaks or letters beyond ASCII.")
        self.session = requests.Session()
        self.session.auth = self._authorized  # without one, requests looks into ~/.netrc
        self.session.headers["Accept-Encoding"] = "identity"  # a small answer cannot unpack to a large one

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Scores (n,).

        Raises:
            RewardError: the server cannot be reached or does not answer as it should.
        """
        scores: list[float] = []
        for start in range(0, len(responses), self.batch_size):
            part = slice(start, start + self.batch_size)
            scores += self._ask(prompts[part], responses[part])
        return scores

    def _authorized(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def _ask(self, prompts: list[str], responses: list[str]) -> list[float]:
        answer = self._post({"prompts": prompts, "responses": responses})
        if "Location" in answer.headers and 300 <= answer.status < 400:
            raise RewardError(
                f"the reward server {self.url} answered {answer.status}, a redirect to "
                f"{self._quoted(answer.headers['Location'])}. None is followed: texts go to no address that the recipe "
                f"does not name; name that one if it is right."
            )
        if answer.status >= 400:
            raise RewardError(f"the reward server {self.url} answered {answer.status}: {self._quoted(answer.text)}")
        try:
            scores = json.loads(answer.text)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RewardError(
                f'the reward server {self.url} answered {self._quoted(answer.text)!r}; {{"scores": […]}} is expected.'
            ) from error
        if not isinstance(scores, list) or len(scores) != len(responses):
            what = f"{len(scores)} scores" if isinstance(scores, list) else self._quoted(repr(scores))
            raise RewardError(f"the reward server {self.url} gave {what} for {len(responses)} responses.")
        return scores

    def _post(self, body: dict[str, list[str]]) -> Answer:
        limit = len(body["responses"]) * BYTES_A_SCORE + OTHER_BYTES
        waits = iter(WAITS)
        while True:
            wait = next(waits, None)
            try:
                answer = self._within_time(lambda end: self._whole_answer(body, limit, end))
            except (InvalidURL, InvalidSchema) as error:
                raise RewardError(f"the reward server {self.url} is no address: {self._quoted(error)}") from error
            except (OSError, HTTPError) as error:  # requests' own are OSErrors
                if wait is None:
                    raise RewardError(
                        f"the reward server {self.url} did not answer in {len(WAITS) + 1} tries, in each of which it "
                        f"may be silent for reward_timeout={self.timeout:g} seconds: {self._quoted(error)}"
                    ) from error
            else:
                if answer.status not in BUSY or wait is None:
                    return answer
                asked = answer.headers.get("Retry-After", "")
                wait = min(float(asked), LONGEST_WAIT) if asked.isdecimal() else wait
            time.sleep(wait)

    def _within_time(self, request: Callable[[float], Answer]) -> Answer:
        """`request(end)` in a thread, given up at `end`: a server's time-out begins anew with every byte it sends."""
        seconds = CONNECT_SECONDS + 2 * self.timeout
        results: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

        def run() -> None:
            try:
                results.put(request(time.monotonic() + seconds))
            except Exception as error:  # raised where it is waited for
                results.put(error)

        threading.Thread(target=run, daemon=True).start()
        try:
            result = results.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"the answer was not whole after {seconds:g} seconds") from None
        if isinstance(result, Exception):
            raise result
        return result

    def _whole_answer(self, body: dict[str, list[str]], limit: int, end: float) -> Answer:
        options = {"timeout": (CONNECT_SECONDS, self.timeout), "allow_redirects": False, "stream": True}
        with self.session.post(self.url, json=body, **options) as answer:
            packed = answer.headers.get("Content-Encoding", "identity")
            if packed != "identity":
                raise RewardError(
                    f"the reward server {self.url} packs its answer ({short(packed)}) unasked; let it not."
                )
            parts, size = [], 0
            while part := answer.raw.read1(65536):
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise RewardError(
                        f"the reward server {self.url} answers {len(body['responses'])} responses with more than "
                        f'{limit} bytes; {{"scores": […]}} is expected.'
                    )
                if time.monotonic() > end:
                    raise TimeoutError("the answer was not whole in time")
            return Answer(answer.status_code, answer.headers, b"".join(parts).decode("utf-8", "replace"))

    def _quoted(self, text: object) -> str:
        """The beginning of what a server or a library says, without what is secret in the address or its header."""
        query = urlsplit(self.url).query
        said = str(text).replace(query, masked_query(query)) if query else str(text)
        for secret in (self._token, *(value for _, value in parse_qsl(query))):
            if len(secret) >= HIDDEN_FROM:
                said = said.replace(secret, HIDDEN)
        return short(said)
