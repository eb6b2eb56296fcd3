"""Reads event generators in tasks of their own: their reader can wait with a limit and take all that is ready."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from serving.generation.interface import ChatEvent

Source = AsyncGenerator[tuple[int, ChatEvent], None]


class Watcher(Protocol):
    """Sees every event when it comes, and the end."""

    def push(self, event: ChatEvent) -> None: ...

    def close(self, is_complete: bool) -> None: ...


@dataclass(frozen=True)
class Deadline:
    """When the sources are given up (time.monotonic(), or infinity), and what the reader is told then."""

    at: float
    failure: Exception


class EventStream:
    """Events of several generators in the order of arrival, source s's choice i as (s * stride + i).

    Holds at most `max_ready` events: past that the sources wait for the reader. Must be closed; closing closes the
    sources, which is how a generation is cancelled. For one event loop, one reader.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        stride: int,
        max_ready: int,
        watcher: Watcher | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self._ready: list[tuple[int, ChatEvent]] = []
        self._max_ready = max_ready
        self._reader: asyncio.Future[None] | None = None  # what the reader waits for
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0  # in the loop's time, of the wait that goes on now
        self._room = asyncio.Event()
        self._room.set()
        self._failure: Exception | None = None
        self._running = len(sources)
        self._watcher = watcher
        self._timer: asyncio.TimerHandle | None = None
        if deadline is not None and deadline.at < math.inf:
            seconds = max(0.0, deadline.at - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(seconds, self._expire, deadline.failure)
        self._tasks = [asyncio.create_task(self._read(source, s * stride)) for s, source in enumerate(sources)]

    async def take(self, timeout_seconds: float | None = None) -> list[tuple[int, ChatEvent]] | None:
        """Everything ready, waiting for the first. None at the end, [] when nothing came in time.

        Raises what a source raised, once the events before it were taken.
        """
        if not self._ready and self._failure is None and self._running:
            await self._wait(timeout_seconds)
            if not self._ready and self._failure is None and self._running:
                return []
        if self._ready:
            events, self._ready = self._ready, []
            self._room.set()
            return events
        if self._failure is not None:
            raise self._failure
        return None

    async def _wait(self, timeout_seconds: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._reader = loop.create_future()
        if timeout_seconds is not None:
            self._alarm_at = loop.time() + timeout_seconds
            if self._alarm is None:
                self._alarm = loop.call_at(self._alarm_at, self._ring)
        await self._reader

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _ring(self) -> None:
        """One timer serves many waits, since a timer for each token costs more than the token: ringing for a wait that
        is over, it is set again for the one that goes on."""
        self._alarm = None
        if self._reader is None or self._reader.done():
            return
        loop = self._reader.get_loop()
        if loop.time() < self._alarm_at:
            self._alarm = loop.call_at(self._alarm_at, self._ring)
        else:
            self._wake()

    async def take_all(self) -> list[tuple[int, ChatEvent]]:
        """Every event up to the end."""
        events: list[tuple[int, ChatEvent]] = []
        while (some := await self.take()) is not None:
            events.extend(some)
        return events

    async def close(self) -> None:
        """Stop every source and wait until it is closed. May be called twice."""
        for timer in (self._timer, self._alarm):
            if timer:
                timer.cancel()
        is_complete = self._running == 0 and self._failure is None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._watcher:
            self._watcher.close(is_complete)

    def _expire(self, failure: Exception) -> None:
        if self._running:
            self._failure = self._failure or failure
            for task in self._tasks:
                task.cancel()
            self._wake()

    async def _read(self, source: Source, first_index: int) -> None:
        try:
            async with aclosing(source):
                async for index, event in source:
                    if self._watcher:
                        self._watcher.push(event)
                    while len(self._ready) >= self._max_ready:
                        self._room.clear()
                        await self._room.wait()
                    self._ready.append((first_index + index, event))
                    self._wake()
        except Exception as error:  # noqa: BLE001
            # the reader raises it in its own task, where the request's answer is made
            self._failure = self._failure or error
        finally:
            self._running -= 1
            self._wake()
