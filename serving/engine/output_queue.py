"""Outputs of one request's sequences -> the one task that reads them: a bounded queue that pauses the sequences."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, Protocol, TypeVar

from serving.engine.outputs import EngineError, PoolingOutput, TokenOutput

MAX_UNREAD = 512  # outputs; past it the sequences are paused until the reader has taken them

logger = logging.getLogger(__name__)

SequenceCommand = Literal["pause", "resume", "cancel"]
OutputT = TypeVar("OutputT", TokenOutput, PoolingOutput)


class RunningSequence(Protocol):
    """What an engine generates for one index of a queue."""

    def send(self, command: SequenceCommand) -> None:
        """Carried out within two steps of the engine."""
        ...

    @property
    def prompt_progress(self) -> tuple[int, int] | None:
        """(prompt tokens that are computed, prompt tokens), or None if the engine does not say."""
        ...


class OutputQueue(Generic[OutputT]):
    """Outputs as (index, output), in the order of arrival, from `Engine.generate` or `Engine.embed` to one reader.

    Belongs to one request and to the event loop that it was made in; every method is called there. Must be closed,
    which cancels what still runs. Nothing but `take` waits, so a cancelled task can always close its queue.
    """

    def __init__(self, max_unread: int = MAX_UNREAD) -> None:
        self.loop = asyncio.get_running_loop()
        self._max_unread = max_unread
        self._running: dict[int, RunningSequence] = {}
        self._outputs: list[tuple[int, OutputT]] = []
        self._error: Exception | None = None
        self._is_paused = False
        self._reader: asyncio.Future[None] | None = None  # what `take` waits for
        self._timer: asyncio.TimerHandle | None = None
        self._wait_ends: float | None = None  # in the loop's time, of the present wait

    def add(self, index: int, sequence: RunningSequence) -> None:
        """Outputs of `sequence` will come under this index. Called by the engine."""
        self._running[index] = sequence

    def put(self, outputs: list[tuple[int, OutputT | EngineError]]) -> None:
        """The outputs of one step. Called by the engine; those of cancelled sequences and those behind an error are
        dropped."""
        for index, output in outputs:
            if self._error is not None or index not in self._running:
                continue
            if isinstance(output, EngineError):
                del self._running[index]
                self._error = output
                continue
            self._outputs.append((index, output))
            if output.finish_reason:
                del self._running[index]
        self._wake_reader()
        if len(self._outputs) > self._max_unread and not self._is_paused:
            self._is_paused = True
            self._send("pause")

    async def take(self, until: float | None = None) -> list[tuple[int, OutputT]] | None:
        """Everything that has come, waiting for the first. None at the end; [] if nothing came before `until`.

        until: in the loop's time; None waits as long as it takes.
        Raises an output's EngineError, or what `fail` was given, once the outputs before it were taken.
        """
        if not self._outputs and self._error is None and self._running:
            await self._wait(until)
            if not self._outputs and self._error is None and self._running:
                return []
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            if self._is_paused:
                self._is_paused = False
                self._send("resume")
            return outputs
        if self._error is not None:
            raise self._error
        return None

    def prompt_progress(self) -> tuple[int, int] | None:
        """Of the prompt whose answer begins first; None if the engine does not say or nothing runs."""
        known = [progress for each in self._running.values() if (progress := each.prompt_progress) is not None]
        return min(known, key=lambda progress: progress[1] - progress[0], default=None)

    def cancel(self, index: int) -> None:
        """No more outputs of this index are wanted. Does nothing if it has ended."""
        sequence = self._running.pop(index, None)
        if sequence is not None:
            sequence.send("cancel")

    def fail(self, error: Exception) -> None:
        """Cancel what still runs; the reader gets `error`. Does nothing if everything has ended."""
        if self._running and self._error is None:
            self._error = error
            self._cancel_all()
            self._wake_reader()

    def close(self) -> None:
        """Cancel what still runs. May be called twice."""
        self._cancel_all()
        if self._timer is not None:
            self._timer.cancel()

    def _cancel_all(self) -> None:
        self._send("cancel")
        self._running.clear()

    def _send(self, command: SequenceCommand) -> None:
        for sequence in self._running.values():
            sequence.send(command)

    async def _wait(self, until: float | None) -> None:
        self._reader = self.loop.create_future()
        self._wait_ends = until
        if until is not None and (self._timer is None or self._timer.when() > until):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_at(until, self._timed_out)
        await self._reader

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _timed_out(self) -> None:
        """One timer serves many waits, since a timer for each token costs more than the token: when it fires for a
        wait that is over, it is set again for the present one."""
        self._timer = None
        if self._reader is None or self._reader.done() or self._wait_ends is None:
            return
        if self.loop.time() < self._wait_ends:
            self._timer = self.loop.call_at(self._wait_ends, self._timed_out)
        else:
            self._wake_reader()


def deliver(outputs: Mapping[OutputQueue[Any], list[tuple[int, Any]]]) -> None:
    """Put a step's outputs into their queues, with one wake-up of each event loop. From any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[OutputQueue[Any], list[tuple[int, Any]]]]] = {}
    for queue, some in outputs.items():
        by_loop.setdefault(queue.loop, []).append((queue, some))
    for loop, of_loop in by_loop.items():
        call_in(loop, _put_all, of_loop)


def _put_all(outputs: list[tuple[OutputQueue[Any], list[tuple[int, Any]]]]) -> None:
    for queue, some in outputs:
        queue.put(some)


def call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """Have an event loop call this, unless it was closed. From any thread."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        logger.debug("an event loop was closed before its requests ended")
