"""Checkpoints that a crash cannot spoil: written aside, sealed with checksums, renamed when complete.

checkpoints/step_000020/    checkpoint.json (the seal), trainer_state.json, weights and optimiser, the run's files
checkpoints/.writing        one being written; whatever a crash leaves there is removed by the next
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import UserError, disk_fault
from pipeline.runtime.distributed import all_or_none
from pipeline.runtime.engine import is_deepspeed, strategy

SEAL = "checkpoint.json"
STATE = "trainer_state.json"
WEIGHTS = "trainable.safetensors"
DEEPSPEED_FOLDER = "pytorch_model"  # Accelerate's names for the parts of sharded weights
FSDP_FOLDER = "pytorch_model_fsdp_0"
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
                why = disk_fault(error) or " ".join(str(error).split())
                raise CheckpointError(f"no checkpoint could be written into {self.directory}: {why}") from error

        all_or_none(self.accelerator, told)

    def load(self, path: Path) -> dict[str, object]:
        """Restore weights and optimiser; returns the state given to `save`.

        Raises:
            CheckpointError: it was written by a run that shared its weights in another way.
        """
        check_topology(path, strategy(self.accelerator), self.accelerator.num_processes)
        self.accelerator.wait_for_everyone()
        lenient = {"load_module_strict": False} if is_deepspeed(self.accelerator) else {}
        with contextlib.chdir(path):  # DeepSpeed takes [1] in the path it is given for a pattern
            self.accelerator.load_state(".", **lenient)
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
            restore_trained(self.accelerator.unwrap_model(models.pop()), load_file(f"{directory}/{WEIGHTS}"))


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


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one checkpoint, and not a run or anything else."""
    return (path / SEAL).is_file()


def trained_weights(path: Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint, whole, in float32, by name; one process reads them, however many wrote them.

    Raises:
        CheckpointError: it is damaged.
    """
    damage = damage_of(path)
    if damage is not None:
        raise CheckpointError(f"{path} is not a whole checkpoint: {damage}; give an older one, or the run itself.")
    sharing = json.loads((path / SEAL).read_text(encoding="utf-8"))["strategy"]
    if sharing.startswith("zero"):
        return _joined_by_deepspeed(path)
    return joined_by_torch(path / FSDP_FOLDER) if sharing == "fsdp2" else load_file(path / WEIGHTS)


def _joined_by_deepspeed(path: Path) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It counts its files on stdout, and takes [1] in the path it is given for a pattern.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(path):
        return get_fp32_state_dict_from_zero_checkpoint(".", tag=DEEPSPEED_FOLDER, exclude_frozen_parameters=True)


def joined_by_torch(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder of `torch.distributed.checkpoint`, as Accelerate writes it under FSDP2."""
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    weights = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():  # that it reads alone, as it was told to
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(weights, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def restore_trained(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the trainable parameters of `model`, by name; it may hold others besides.

    Raises:
        CheckpointError: one is missing or has another shape.
    """
    for name, tensor in _trainable(model).items():
        if name not in weights or weights[name].shape != tensor.shape:
            found = f"the shape {tuple(weights[name].shape)}" if name in weights else "no such weight"
            raise CheckpointError(
                f"the checkpoint is of another model: {name} has the shape {tuple(tensor.shape)} here, and there is "
                f"{found} there."
            )
        tensor.copy_(weights[name])


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
