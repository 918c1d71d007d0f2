"""A reward model served elsewhere, asked over HTTP."""

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from pipeline.rewards.protocol import RewardError

RETRIES = 4  # after 0.5, 1, 2 and 4 seconds
CONNECT_SECONDS = 10.0


class RemoteReward:
    """Posts {"prompts": […], "responses": […]} as JSON and takes {"scores": […]}, a number each, in the same order.

    Connections that fail or break, time-outs and the answers 429, 500, 502, 503 and 504 are tried again (a server's
    Retry-After is heeded).
    """

    def __init__(self, url: str, *, batch_size: int, timeout: float):
        """
        Args:
            batch_size: texts a request.
            timeout: seconds to wait for an answer, each time.
        """
        self.url, self.batch_size, self.timeout = url, batch_size, timeout
        self.session = requests.Session()
        retry = Retry(total=RETRIES, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504),
                      allowed_methods=None, raise_on_status=False)  # fmt: skip
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry))

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

    def _ask(self, prompts: list[str], responses: list[str]) -> list[float]:
        body = {"prompts": prompts, "responses": responses}
        try:
            answer = self.session.post(self.url, json=body, timeout=(CONNECT_SECONDS, self.timeout))
        except requests.RequestException as error:
            raise RewardError(
                f"the reward server {self.url} did not answer in {RETRIES + 1} tries of at most reward_timeout="
                f"{self.timeout:g} seconds: {error}"
            ) from error
        if not answer.ok:
            raise RewardError(f"the reward server {self.url} answered {answer.status_code}: {answer.text[:300]}")
        try:
            scores = answer.json()["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise RewardError(
                f'the reward server {self.url} answered {answer.text[:300]!r}; {{"scores": […]}} is expected.'
            ) from error
        if not isinstance(scores, list) or len(scores) != len(responses):
            what = f"{len(scores)} scores" if isinstance(scores, list) else repr(scores)[:300]
            raise RewardError(f"the reward server {self.url} gave {what} for {len(responses)} responses.")
        return scores
