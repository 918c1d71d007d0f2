"""Where the host waits for the device: nowhere in the loops that launch, and rarely in a step."""

import contextlib
import linecache
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu_checks.context import Context
from benchmarks.gpu_checks.runs import more_steps, trainer_in_hand
from pipeline.rollout.decoding import DecodeGraphs
from pipeline.trainer import PPOTrainer

SYNC_WARNING = "synchronizing CUDA operation"  # in what PyTorch's debug mode warns
MOST_IN_A_STEP = 12  # of one epoch, one part of the rollout and one microbatch for each minibatch, up to 16 tokens


@contextlib.contextmanager
def _debug_mode(context: Context, mode: str) -> Iterator[None]:
    """A context in which an operation that waits for the device warns or is an error; nothing on a CPU."""
    if context.rehearsal:
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _WatchedGraphs(DecodeGraphs):
    """Graphs whose step may not wait for the device."""

    def __init__(self, context: Context, failure: str | None):
        super().__init__(failure)
        self.context, self.steps = context, 0

    def captured(self, *arguments: object) -> Callable[[], object]:
        advance = super().captured(*arguments)

        def watched() -> None:
            self.steps += 1
            with _debug_mode(self.context, "error"):
                advance()

        return watched


def decode_step(context: Context) -> None:
    """A token's step, replayed and as the plain loop."""
    context.on_gpu("PyTorch's debug mode for synchronizations")
    for precision in ("no", "bf16"):
        for how, failure in (("graph", None), ("loop", "the plain loop was asked for")):
            with trainer_in_hand(context, mixed_precision=precision) as trainer, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is no graph
                trainer.graphs = graphs = _WatchedGraphs(context, failure)
                where = _place_of_wait(lambda trainer=trainer: trainer.sample(0, trainer.draw_prompts(0)))
                context.measure(**{f"steps, {how}, {precision}": graphs.steps})
                context.require(f"no wait in {how}, {precision} ({where})", where is None and graphs.steps > 0)


def _place_of_wait(action: Callable[[], object]) -> str | None:
    """Where `action` waited for the device although that was an error; None where it did not."""
    try:
        action()
    except RuntimeError as error:
        if SYNC_WARNING not in str(error):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
        return f"{frames[-1].filename}:{frames[-1].lineno}"
    return None


class _MinibatchGuard:
    """Makes waiting an error from the first microbatch's forward to the last of `expected` optimizer steps."""

    def __init__(self, context: Context, expected: int):
        self.watching, self.context, self.expected, self.steps = contextlib.ExitStack(), context, expected, 0

    def forward(self, _module: object, _arguments: object, named: dict[str, object]) -> None:
        """Before a forward; one with a loss is the update's."""
        if named.get("token_loss") is not None and self.steps == 0:
            self.watching.enter_context(_debug_mode(self.context, "error"))

    def stepped(self, *_arguments: object) -> None:
        """After an optimizer step."""
        self.steps += 1
        if self.steps == self.expected:
            self.watching.close()


def minibatch_loop(context: Context) -> None:
    """From the first microbatch's forward to the last optimizer step."""
    context.on_gpu("PyTorch's debug mode for synchronizations")
    for precision in ("no", "bf16"):
        with trainer_in_hand(context, mixed_precision=precision, kl_early_stop="null") as trainer:
            more_steps(trainer, 1)
            ppo, batch = trainer.config.ppo, trainer.config.rollout.rollout_batch_size
            guard = _MinibatchGuard(context, ppo.ppo_epochs * batch // ppo.minibatch_size)
            trainer.engine.register_forward_pre_hook(guard.forward, with_kwargs=True)
            getattr(trainer.optimizer, "optimizer", trainer.optimizer).register_step_post_hook(guard.stepped)
            with guard.watching:
                where = _place_of_wait(lambda trainer=trainer: more_steps(trainer, 1))
            context.measure(**{f"optimizer steps, {precision}": guard.steps})
            context.require(f"no wait in the minibatches, {precision} ({where})", where is None)
            context.require(f"all minibatches were watched, {precision}", guard.steps == guard.expected)


def whole_step(context: Context) -> None:
    """How often a step waits, and where."""
    context.on_gpu("PyTorch's debug mode for synchronizations")
    size = context.sized(64, 4)
    settings = {"minibatch_size": size, "microbatch_size": size, "rollout_microbatch_size": 2 * size, "ppo_epochs": 1,
                "response_max_tokens": context.sized(16, 5)}  # fmt: skip
    for precision in ("no", "bf16"):
        with trainer_in_hand(context, mixed_precision=precision, **settings) as trainer:
            more_steps(trainer, 1)
            waits = _waits(context, trainer)
        counted = [place for place, in_main in waits if in_main and not _is_expected(place)]
        context.measure(**{f"places, {precision}": dict(Counter(place for place, _in_main in waits).most_common())})
        context.measure(**{f"waits, {precision}": len(counted)})
        context.require(f"at most {MOST_IN_A_STEP} waits, {precision}", len(counted) <= MOST_IN_A_STEP)


def _waits(context: Context, trainer: PPOTrainer) -> list[tuple[str, bool]]:
    """Of each wait in a step: the line of the program, and whether it was in the main thread."""
    waits: list[tuple[str, bool]] = []

    def note(message: Warning, _category: type, filename: str, line: int, *_more: object) -> None:
        if SYNC_WARNING in str(message):
            place = f"{Path(filename).name}:{line}: {linecache.getline(filename, line).strip()}"
            waits.append((place, threading.current_thread() is threading.main_thread()))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        with _debug_mode(context, "warn"):
            more_steps(trainer, 1)
    return waits


def _is_expected(place: str) -> bool:
    """Whether it is a copy to the device, which waits for nothing but itself, or one of the figures of a step."""
    return ".to(" in place or place.startswith("metrics.py:")
