"""Engines on one device get equal shares of its time, however long the steps of each are."""

from __future__ import annotations

import threading

import pytest

from serving.engine import turns
from serving.engine.turns import DeviceTurns, EngineTurns


class Clock:
    """Goes on only while an engine has the device."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    return clock


def run_steps(clock: Clock, engines: dict[EngineTurns, float], until: float) -> dict[EngineTurns, float]:
    """Each engine takes turns with steps of its own length; the time that each had. All have asked before the first."""
    had = dict.fromkeys(engines, 0.0)
    holder = DeviceTurns.of_engine(next(iter(engines))._turns)  # holds the device until all wait

    def work(engine: EngineTurns, seconds: float) -> None:
        while clock.now < until:
            with engine:
                clock.now += seconds
                had[engine] += seconds

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in engines.items()]
    with holder:
        for thread in threads:
            thread.start()
        while len(holder._turns._waiting) < len(engines):
            threading.Event().wait(0.001)
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    return had


def test_two_busy_engines_get_half_of_the_time_each(clock: Clock) -> None:
    device = DeviceTurns()
    long, short = device.of_engine(), device.of_engine()
    had = run_steps(clock, {long: 4.0, short: 1.0}, until=400.0)
    assert had[long] == pytest.approx(had[short], abs=2 * 4.0 + 1.0)


def test_an_idle_engine_saves_no_time_up(clock: Clock) -> None:
    device = DeviceTurns()
    busy, idle = device.of_engine(), device.of_engine()
    for _ in range(100):
        with busy:
            clock.now += 1.0
    begun = clock.now
    had = run_steps(clock, {busy: 1.0, idle: 1.0}, until=begun + 40.0)
    assert had[busy] == pytest.approx(had[idle], abs=3.0)


def test_a_failed_step_gives_the_device_back(clock: Clock) -> None:
    device = DeviceTurns()
    first, second = device.of_engine(), device.of_engine()
    with pytest.raises(ValueError, match="step"), first:
        raise ValueError("step")
    with second:
        clock.now += 1.0
    assert second.virtual_time == 1.0
