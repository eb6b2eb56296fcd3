"""Engines on one device take turns: each step has the device for itself, and each engine its share of the time."""

from __future__ import annotations

import threading
import time
from types import TracebackType


class DeviceTurns:
    """Start-time fair queueing of steps. Two busy engines get half of the time each, however long their steps are."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._virtual_time = 0.0  # seconds of the device at which the present step began for its engine
        self._waiting: list[EngineTurns] = []
        self._is_taken = False

    def of_engine(self) -> EngineTurns:
        """For one engine: `with` it around each step."""
        return EngineTurns(self)

    def acquire(self, engine: EngineTurns) -> None:
        """Wait until the device is free and no engine that waits has had less of it."""
        with self._changed:
            # an engine that was idle does not get the time that it did not ask for
            engine.virtual_time = max(engine.virtual_time, self._virtual_time)
            self._waiting.append(engine)
            self._changed.wait_for(
                lambda: not self._is_taken and engine is min(self._waiting, key=lambda each: each.virtual_time)
            )
            self._waiting.remove(engine)
            self._is_taken, self._virtual_time = True, engine.virtual_time
            engine.begun = time.monotonic()

    def release(self, engine: EngineTurns) -> None:
        with self._changed:
            engine.virtual_time += time.monotonic() - engine.begun
            self._is_taken = False
            self._changed.notify_all()


class EngineTurns:
    """One engine's turns, as a context manager. For one thread."""

    def __init__(self, turns: DeviceTurns) -> None:
        self._turns = turns
        self.virtual_time = 0.0  # seconds of the device that this engine has had, idle times made up for
        self.begun = 0.0

    def __enter__(self) -> None:
        self._turns.acquire(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turns.release(self)
