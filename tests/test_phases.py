"""The phases of a step: who hears of them, and what one says when memory runs out."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.phases import Phases, out_of_memory

CONFIG = SimpleNamespace(
    as_dict=lambda: {"rollout_microbatch_size": 64, "reward_batch_size": 128, "microbatch_size": 32}
)


def really_out_of_memory() -> RuntimeError:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    return raised.value


@pytest.mark.parametrize(
    ("phase", "remedy"),
    [
        ("sample", "lower rollout_microbatch_size=64"),
        ("reference", "lower rollout_microbatch_size=64"),
        ("forward", "lower microbatch_size=32"),
        ("score", "lower reward_batch_size=128"),
        ("update", "lower microbatch_size=32"),
    ],
)
@pytest.mark.parametrize("error", [really_out_of_memory, lambda: torch.OutOfMemoryError("CUDA out of memory.")])
def test_out_of_memory_names_the_setting_to_lower(phase, remedy, error):
    told = out_of_memory(error(), phase, CONFIG)
    assert isinstance(told, MemoryError) and remedy in str(told)


def test_other_errors_are_left_alone():
    assert out_of_memory(RuntimeError("shapes do not match"), "update", CONFIG) is None
    assert out_of_memory(really_out_of_memory(), "step", CONFIG) is None


def test_a_watcher_hears_of_each_phase_as_it_begins():
    phases, heard = Phases(CONFIG, torch.device("cpu")), []
    with phases.timed("sample"):
        pass
    phases.watcher = lambda name: heard.append((name, dict(phases.seconds)))
    with phases.timed("step"), phases.timed("update"):
        assert [name for name, _ in heard] == ["step", "update"]
    assert "update" not in heard[1][1] and {"sample", "step", "update"} == set(phases.seconds)
