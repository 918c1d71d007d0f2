"""Work beside a GPU's: its result or its error comes when asked for."""

import threading

import pytest
import torch

from pipeline.runtime.overlap import _in_thread, alongside


def test_in_a_thread_the_work_goes_on_while_the_caller_does_something_else():
    started, may_end = threading.Event(), threading.Event()

    def action():
        started.set()
        assert may_end.wait(10)
        return threading.current_thread()

    result = _in_thread(action)
    assert started.wait(10)  # without having been asked for
    may_end.set()
    assert result() is not threading.current_thread()


def test_an_error_in_the_thread_is_raised_where_the_result_is_asked_for():
    def action():
        raise KeyError("missing")

    result = _in_thread(action)
    with pytest.raises(KeyError, match="missing"):
        result()


def test_on_a_cpu_the_work_is_done_when_its_result_is_asked_for():
    done = []
    result = alongside(torch.device("cpu"), lambda: done.append(1) or "scores")
    assert not done
    assert result() == "scores" and done == [1]


@pytest.mark.parametrize(("device", "chosen"), [("cuda", []), ("cuda:1", [1])])  # one process has no number
def test_the_thread_works_on_the_callers_gpu(monkeypatch, device, chosen):
    told = []
    monkeypatch.setattr(
        torch._C, "_cuda_setDevice", lambda index: told.append((index, threading.current_thread())), raising=False
    )
    assert alongside(torch.device(device), lambda: threading.current_thread())() is not threading.current_thread()
    assert [index for index, _ in told] == chosen
    assert threading.current_thread() not in [thread for _, thread in told]
