"""The phases of a PPO step: how long each takes, and what to do where one runs out of memory."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pipeline.config import Config


class Phases:
    """A step's clock."""

    def __init__(self, config: Config, device: torch.device):
        self._config, self._device = config, device
        self.seconds: dict[str, float] = defaultdict(float)
        self.watcher: Callable[[str], None] | None = None  # told the name of each phase as it begins

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of what runs inside to `phase`, a GPU's work included.

        Raises:
            MemoryError: memory ran out; the message names the setting to lower.
        """
        if self.watcher is not None:
            self.watcher(phase)
        start = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            told = out_of_memory(error, phase, self._config)
            if told is None:
                raise
            raise told from error
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start


# What each phase's memory grows with.
MEMORY_SETTINGS = {
    "sample": "rollout_microbatch_size",
    "score": "reward_batch_size",
    "reference": "rollout_microbatch_size",
    "forward": "microbatch_size",
    "update": "microbatch_size",
}


def out_of_memory(error: Exception, phase: str, config: Config) -> Exception | None:
    """An error that names the setting to lower, where `error` says that memory ran out."""
    if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
        return None
    name = MEMORY_SETTINGS.get(phase)
    if name is None:
        return None
    value = config.as_dict()[name]
    return MemoryError(f"out of memory ({phase}): lower {name}={value}, which changes nothing else. {error}")
