"""The first signal asks the run to end, its echo from the launcher does not kill it, a second one does."""

import signal
from types import SimpleNamespace

import pytest

from pipeline.runtime import signals
from pipeline.runtime.signals import StopRequest


@pytest.fixture
def clock(monkeypatch):
    """Time as the test sets it, and the codes with which the process would have ended at once."""
    clock = SimpleNamespace(now=100.0, exits=[])
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(signals, "os", SimpleNamespace(_exit=clock.exits.append))
    return clock


@pytest.fixture
def stop(clock):
    with StopRequest() as stop:
        yield stop


def test_the_signals_are_given_back_at_the_end():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.raises(ZeroDivisionError), StopRequest():
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
        raise ZeroDivisionError
    assert {number: signal.getsignal(number) for number in before} == before


def test_nothing_is_requested_before_a_signal(stop):
    assert not stop.requested
    assert stop.signal_number == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_the_first_signal_is_a_request(stop, clock, name):
    signal.raise_signal(signal.Signals[name])
    assert stop.requested
    assert stop.signal_number == signal.Signals[name]
    assert clock.exits == []


def test_a_second_interrupt_within_a_second_is_the_same_request(stop, clock):
    signal.raise_signal(signal.SIGINT)
    clock.now += 0.9
    signal.raise_signal(signal.SIGINT)
    assert stop.requested
    assert clock.exits == []


def test_a_second_interrupt_later_ends_the_process_at_once(stop, clock):
    signal.raise_signal(signal.SIGINT)
    clock.now += 1.1
    signal.raise_signal(signal.SIGINT)
    assert clock.exits == [130]


def test_an_echo_does_not_put_off_the_second_interrupt(stop, clock):
    signal.raise_signal(signal.SIGINT)
    for _ in range(3):
        clock.now += 0.4
        signal.raise_signal(signal.SIGINT)
    assert clock.exits == [130]


def test_terminations_never_end_the_process_at_once(stop, clock):
    for _ in range(3):
        signal.raise_signal(signal.SIGTERM)
        clock.now += 5
    assert stop.signal_number == signal.SIGTERM
    assert clock.exits == []
