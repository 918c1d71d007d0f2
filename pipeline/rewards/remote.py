"""A reward model served elsewhere, asked over HTTP."""

import time

import requests
from requests.exceptions import InvalidSchema, InvalidURL

from pipeline.rewards.protocol import RewardError, short

WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds, after each try that failed but the last
LONGEST_WAIT = 60.0  # whatever a server's Retry-After says
BUSY = (429, 500, 502, 503, 504)
CONNECT_SECONDS = 10.0


class RemoteReward:
    """Posts {"prompts": […], "responses": […]} as JSON and takes {"scores": […]}, a number each, in the same order.

    Connections that fail or break, time-outs and the answers 429, 500, 502, 503 and 504 are tried again (a server's
    Retry-After in seconds is heeded, up to a minute).
    """

    def __init__(self, url: str, *, batch_size: int, timeout: float):
        """
        Args:
            batch_size: texts a request.
            timeout: seconds for which the server may be silent, each time.
        """
        self.url, self.batch_size, self.timeout = url, batch_size, timeout
        self.session = requests.Session()

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
        answer = self._post({"prompts": prompts, "responses": responses})
        if not answer.ok:
            raise RewardError(f"the reward server {self.url} answered {answer.status_code}: {short(answer.text)}")
        try:
            scores = answer.json()["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise RewardError(
                f'the reward server {self.url} answered {short(answer.text)!r}; {{"scores": […]}} is expected.'
            ) from error
        if not isinstance(scores, list) or len(scores) != len(responses):
            what = f"{len(scores)} scores" if isinstance(scores, list) else short(repr(scores))
            raise RewardError(f"the reward server {self.url} gave {what} for {len(responses)} responses.")
        return scores

    def _post(self, body: dict[str, list[str]]) -> requests.Response:
        waits = iter(WAITS)
        while True:
            wait = next(waits, None)
            try:
                answer = self.session.post(self.url, json=body, timeout=(CONNECT_SECONDS, self.timeout))
            except (InvalidURL, InvalidSchema) as error:
                raise RewardError(f"the reward server {self.url} is no address: {short(error)}") from error
            except requests.RequestException as error:
                if wait is None:
                    raise RewardError(
                        f"the reward server {self.url} did not answer in {len(WAITS) + 1} tries, in each of which it "
                        f"may be silent for reward_timeout={self.timeout:g} seconds: {short(error)}"
                    ) from error
            else:
                if answer.status_code not in BUSY or wait is None:
                    return answer
                asked = answer.headers.get("Retry-After", "")
                wait = min(float(asked), LONGEST_WAIT) if asked.isdecimal() else wait
            time.sleep(wait)
