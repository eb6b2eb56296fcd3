"""Outputs on their way from the engine to a reader: in order, bounded, and cancelled with the queue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from serving.engine.output_queue import OutputQueue, SequenceCommand
from serving.engine.outputs import EngineStopped, RequestFailed, TokenOutput

Queue = OutputQueue[TokenOutput]


class Commands:
    """A running sequence that only notes what it is sent."""

    def __init__(self) -> None:
        self.sent: list[SequenceCommand] = []

    def send(self, command: SequenceCommand) -> None:
        self.sent.append(command)


def queue_of(*sequences: Commands, max_unread: int = 4) -> Queue:
    queue = Queue(max_unread)
    for index, sequence in enumerate(sequences):
        queue.add(index, sequence)
    return queue


def token(token_id: int, is_last: bool = False) -> TokenOutput:
    return TokenOutput(token_id, "stop" if is_last else None)


def ids(outputs: list[tuple[int, TokenOutput]] | None) -> list[tuple[int, int]] | None:
    return None if outputs is None else [(index, output.token_id) for index, output in outputs]


def in_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    return lambda: asyncio.run(test())  # type: ignore[arg-type]


@in_loop
async def test_everything_that_has_come_is_taken_at_once_and_the_end_is_none() -> None:
    queue = queue_of(Commands(), Commands())
    queue.put([(0, token(1)), (1, token(2))])
    queue.put([(0, token(3, is_last=True))])
    assert ids(await queue.take()) == [(0, 1), (1, 2), (0, 3)]
    reading = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.put([(1, token(4, is_last=True))])
    assert ids(await reading) == [(1, 4)]
    assert await queue.take() is None


@in_loop
async def test_a_reader_that_is_behind_pauses_the_sequences_and_resumes_them() -> None:
    sequences = [Commands(), Commands()]
    queue = queue_of(*sequences)
    for _ in range(3):
        queue.put([(0, token(1)), (1, token(1))])
    queue.put([(0, token(1, is_last=True))])
    assert [sequence.sent for sequence in sequences] == [["pause"], ["pause"]]
    assert len(await queue.take() or []) == 7  # what the engine had under way is kept
    assert [sequence.sent for sequence in sequences] == [["pause"], ["pause", "resume"]]  # the first has ended


@in_loop
async def test_a_wait_ends_in_time_whether_or_not_waits_before_it_had_an_end() -> None:
    queue = queue_of(Commands())
    loop = asyncio.get_running_loop()
    assert await queue.take(loop.time() + 0.01) == []
    queue.put([(0, token(1))])
    await queue.take(loop.time() + 0.03)
    reading = asyncio.create_task(queue.take())  # the timer of the wait before fires in this one
    await asyncio.sleep(0.05)
    assert not reading.done()
    reading.cancel()
    begun = loop.time()
    assert await queue.take(begun + 0.02) == []
    assert loop.time() - begun >= 0.02


@in_loop
async def test_an_error_comes_after_the_outputs_before_it_and_nothing_after_it() -> None:
    other = Commands()
    queue = queue_of(Commands(), other)
    queue.put([(0, token(1)), (0, RequestFailed("first")), (1, token(2))])
    queue.put([(1, token(3))])
    assert ids(await queue.take()) == [(0, 1)]
    for _ in range(2):
        with pytest.raises(RequestFailed, match="first"):
            await queue.take()
    queue.close()
    assert other.sent == ["cancel"]


@in_loop
async def test_a_cancelled_sequence_brings_nothing_more() -> None:
    sequence = Commands()
    queue = queue_of(sequence, Commands())
    queue.cancel(0)
    queue.cancel(0)
    queue.put([(0, token(1)), (1, token(2, is_last=True))])
    assert ids(await queue.take()) == [(1, 2)]
    assert await queue.take() is None
    assert sequence.sent == ["cancel"]


@in_loop
async def test_a_failure_cancels_what_runs_and_wakes_the_reader() -> None:
    sequence = Commands()
    queue = queue_of(sequence)
    reading = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.fail(EngineStopped("gone"))
    queue.fail(EngineStopped("again"))
    with pytest.raises(EngineStopped, match="gone"):
        await reading
    queue.close()
    assert sequence.sent == ["cancel"]


@in_loop
async def test_what_has_ended_cannot_fail_any_more() -> None:
    queue = queue_of(Commands())
    queue.put([(0, token(1, is_last=True))])
    queue.fail(EngineStopped("too late"))
    assert ids(await queue.take()) == [(0, 1)]
    assert await queue.take() is None
