"""A checkpoint is whole or is seen not to be; loading it brings everything back."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from pipeline.config import ConfigError
from pipeline.run_directory import check_disk
from pipeline.runtime.checkpoints import (
    SEAL,
    CheckpointError,
    Checkpoints,
    all_checkpoints,
    check_topology,
    damage_of,
    newest_whole,
)


def prepared(seed: int = 0):
    """An accelerator with a small model, of which one layer is frozen, after one step of Adam."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def step(accelerator, model, optimizer, value: float) -> None:
    accelerator.backward(model(torch.full((2, 3), value)).square().sum())
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def saved(tmp_path):
    """(directory, the checkpoint of step 7) of a run whose state and files are known."""
    accelerator, model, optimizer = prepared()
    step(accelerator, model, optimizer, 1.0)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    checkpoints = Checkpoints(accelerator, tmp_path / "checkpoints", keep_last=2)
    path = checkpoints.save(7, {"kl_coef": 0.1}, {"metrics.jsonl": tmp_path / "metrics.jsonl"})
    return tmp_path / "checkpoints", path


def test_a_restored_run_continues_bit_for_bit(tmp_path):
    accelerator, model, optimizer = prepared()
    checkpoints = Checkpoints(accelerator, tmp_path, keep_last=1)
    step(accelerator, model, optimizer, 1.0)
    path = checkpoints.save(1, {"kl_coef": 1 / 3, "moments": None})
    step(accelerator, model, optimizer, 2.0)
    expected = [p.clone() for p in model.parameters()]
    accelerator, model, optimizer = prepared(seed=0)
    assert Checkpoints(accelerator, tmp_path, keep_last=1).load(path) == {"kl_coef": 1 / 3, "moments": None}
    step(accelerator, model, optimizer, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))


def test_frozen_weights_are_not_kept(saved):
    _, path = saved
    assert set(load_file(path / "trainable.safetensors")) == {"1.weight", "1.bias"}


def test_files_come_along_and_nothing_is_left_aside(saved):
    directory, path = saved
    assert (path / "metrics.jsonl").read_text() == "{}\n"
    assert [entry.name for entry in directory.iterdir()] == ["step_000007"]
    assert damage_of(path) is None


def test_only_the_last_are_kept(tmp_path):
    accelerator, _, _ = prepared()
    checkpoints = Checkpoints(accelerator, tmp_path, keep_last=2)
    for number in (2, 4, 10):
        checkpoints.save(number, {})
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step_000004", "step_000010"]
    assert len(list(tmp_path.iterdir())) == 2


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("optimizer.bin", lambda path: path.unlink(), "optimizer.bin is missing"),
        ("trainable.safetensors", cut, "bytes instead of"),
        ("trainable.safetensors", flip, "trainable.safetensors has another checksum"),
        (SEAL, lambda path: path.unlink(), f"it has no {SEAL}"),
        (SEAL, cut, f"{SEAL} cannot be read"),
        (SEAL, lambda path: path.write_text("[]"), f"{SEAL} cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(saved, name, damage, message):
    directory, path = saved
    shutil.copytree(path, directory / "step_000009")
    damage(directory / "step_000009" / name)
    told = []
    assert newest_whole(directory, told.append) == path
    assert len(told) == 1 and "step_000009" in told[0] and message in told[0]


def test_what_a_crash_left_aside_is_no_checkpoint_and_is_cleared(saved):
    directory, path = saved
    shutil.copytree(path, directory / ".writing")
    shutil.copytree(path, directory / ".removing_step_000003")
    assert all_checkpoints(directory) == [path]
    accelerator, _, _ = prepared()
    Checkpoints(accelerator, directory, keep_last=1).save(8, {})
    assert not (directory / ".writing").exists()


def test_a_full_disk_is_an_error_that_leaves_the_others(saved, monkeypatch):
    directory, path = saved
    accelerator, _, _ = prepared()
    checkpoints = Checkpoints(accelerator, directory, keep_last=1)

    def full(*_arguments, **_settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(accelerator, "save_state", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoints.save(8, {})
    assert newest_whole(directory, pytest.fail) == path


@pytest.mark.parametrize(
    ("written", "now", "fits"),
    [
        (("single", 1), ("ddp", 4), True),
        (("ddp", 4), ("ddp", 2), True),
        (("zero2", 2), ("zero2", 2), True),
        (("zero2", 2), ("zero2", 4), False),
        (("zero2", 2), ("ddp", 2), False),
        (("ddp", 2), ("zero3", 2), False),
    ],
)
def test_weights_in_parts_want_as_many_workers(saved, written, now, fits):
    _, path = saved
    seal = json.loads((path / SEAL).read_text())
    (path / SEAL).write_text(json.dumps({**seal, "strategy": written[0], "processes": written[1]}))
    if fits:
        check_topology(path, *now)
    else:
        with pytest.raises(CheckpointError, match=f"{written[1]} workers under {written[0]}.*{now[1]} under {now[0]}"):
            check_topology(path, *now)


def test_the_disk_that_checkpoints_need_counts_frozen_weights_where_they_are_written_too(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: SimpleNamespace(free=4 * (3 * 10 + 100) * 3))
    check_disk(tmp_path, 10, 2, frozen=100)
    with pytest.raises(ConfigError, match="keep_last=2 checkpoints and the one being written take"):
        check_disk(tmp_path, 10, 2, frozen=101)
