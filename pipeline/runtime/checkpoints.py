"""Checkpoints that a crash cannot spoil: written aside, sealed with checksums, renamed when complete.

checkpoints/step_000020/    checkpoint.json (the seal), trainer_state.json, weights and optimiser, the run's files
checkpoints/.writing        one being written; whatever a crash leaves there is removed by the next
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.runtime.distributed import all_or_none
from pipeline.runtime.engine import is_deepspeed, strategy

SEAL = "checkpoint.json"
STATE = "trainer_state.json"
WEIGHTS = "trainable.safetensors"
FORMAT = 1
_NAME = re.compile(r"step_(\d+)")


class CheckpointError(UserError, ValueError):
    """A checkpoint cannot be written, or not be resumed from; the message names it, what is wrong and the remedy."""


class Checkpoints:
    """The checkpoints of one run. Saving and loading are collective; their directory is shared by all workers."""

    def __init__(self, accelerator: Accelerator, directory: Path, *, keep_last: int):
        """
        Args:
            directory: holds one folder a checkpoint.
            keep_last: older ones than this many are deleted.
        """
        self.accelerator = accelerator
        self.directory = directory
        self.keep_last = keep_last
        # Frozen weights, most of a LoRA policy, come from the model the run starts from.
        accelerator.register_save_state_pre_hook(self._save_trainable)
        accelerator.register_load_state_pre_hook(self._load_trainable)

    def save(self, step: int, state: Mapping[str, object], files: Mapping[str, Path] | None = None) -> Path:
        """Write the checkpoint after `step` steps: weights and optimiser, `state` (JSON) and copies of `files`.

        Raises:
            CheckpointError: the disk is full, for example; the checkpoints before stay as they are.
        """
        aside, target = self.directory / ".writing", self.directory / f"step_{step:06}"
        only_trainable = {"exclude_frozen_parameters": True} if is_deepspeed(self.accelerator) else {}

        def complete() -> None:
            (aside / STATE).write_text(json.dumps(dict(state), indent=1), encoding="utf-8")
            for name, path in (files or {}).items():
                shutil.copyfile(path, aside / name)
            _seal(aside, step, self.accelerator)
            if target.exists():
                _remove(target)
            aside.rename(target)
            for old in all_checkpoints(self.directory)[: -self.keep_last]:
                _remove(old)

        self._together(lambda: _empty(aside), main_only=True)
        self._together(lambda: self.accelerator.save_state(str(aside), **only_trainable))
        self._together(complete, main_only=True)
        return target

    def _together(self, action: Callable[[], object], *, main_only: bool = False) -> None:
        """Run `action` on every worker or on rank zero; a disk that fails one of them is an error of all."""

        def told() -> None:
            try:
                if self.accelerator.is_main_process or not main_only:
                    action()
            except (OSError, RuntimeError, SafetensorError) as error:  # torch says RuntimeError when the disk is full
                raise CheckpointError(f"no checkpoint could be written into {self.directory}: {error}") from error

        all_or_none(self.accelerator, told)

    def load(self, path: Path) -> dict[str, object]:
        """Restore weights and optimiser; returns the state given to `save`.

        Raises:
            CheckpointError: it was written by a run that shared its weights in another way.
        """
        check_topology(path, strategy(self.accelerator), self.accelerator.num_processes)
        self.accelerator.wait_for_everyone()
        lenient = {"load_module_strict": False} if is_deepspeed(self.accelerator) else {}
        self.accelerator.load_state(str(path), **lenient)
        self.accelerator.wait_for_everyone()
        return json.loads((path / STATE).read_text(encoding="utf-8"))

    def _save_trainable(self, models: list[nn.Module], weights: list[dict], directory: str) -> None:
        """In place of whole state dicts; `weights` is empty where the strategy saves its parts itself."""
        if weights:
            weights.clear()
            if self.accelerator.is_main_process:
                trained = _trainable(self.accelerator.unwrap_model(models[0]))
                save_file(
                    {name: tensor.cpu().contiguous() for name, tensor in trained.items()}, f"{directory}/{WEIGHTS}"
                )

    def _load_trainable(self, models: list[nn.Module], directory: str) -> None:
        if models:
            saved = load_file(f"{directory}/{WEIGHTS}")
            for name, tensor in _trainable(self.accelerator.unwrap_model(models.pop())).items():
                tensor.copy_(saved[name])


def all_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first, damaged ones too."""
    found = [path for path in directory.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def newest_whole(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are named and passed over."""
    for path in reversed(all_checkpoints(directory)):
        damage = damage_of(path)
        if damage is None:
            return path
        say(f"Checkpoint {path} is damaged and passed over: {damage}.")
    return None


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file must be there with the size and checksum of its seal."""
    try:
        seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
        files = seal["files"]
    except FileNotFoundError:
        return f"it has no {SEAL}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{SEAL} cannot be read ({error})"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if _digest(file) != expected["sha256"]:
            return f"{name} has another checksum"
    return None


def check_topology(path: Path, now: str, processes: int) -> None:
    """Refuse a checkpoint whose files this run's strategy cannot read.

    Replicated weights (one process or data parallel) resume on any number of workers; DeepSpeed and FSDP keep a part a
    worker and want as many.

    Raises:
        CheckpointError: names both topologies and the remedy.
    """
    seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
    then, before = seal["strategy"], seal["processes"]
    replicated = ("single", "ddp")
    if (then, before) != (now, processes) and not (then in replicated and now in replicated):
        raise CheckpointError(
            f"{path} was written by {before} workers under {then}, and this run has {processes} under {now}; launch it "
            f"as it was, or start over with --resume never."
        )


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(folder: Path, step: int, accelerator: Accelerator) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    seal = {
        "format": FORMAT,
        "step": step,
        "strategy": strategy(accelerator),
        "processes": accelerator.num_processes,
        "files": files,
    }
    with (folder / SEAL).open("w", encoding="utf-8") as file:
        json.dump(seal, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _remove(folder: Path) -> None:
    """Delete so that a crash in between leaves no half of a checkpoint."""
    doomed = folder.with_name(f".removing_{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
