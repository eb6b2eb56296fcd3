"""Texts -> vectors of an encoder: a thread that takes texts of similar length together, whoever sent them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from serving.engine.interface import Encoder, EncoderInput, EngineLimits, EngineStats
from serving.engine.output_queue import OutputQueue, SequenceCommand, deliver
from serving.engine.outputs import EngineError, EngineStopped, NotFinite, OutOfMemory, PoolingOutput, RequestFailed
from serving.safe_traceback import where_from

MAX_LOOKED_AT = 1024  # waiting inputs among which those of similar length are searched for
MAX_PADDING = 1.5  # the longest input of a batch has at most so many times the tokens of the first

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Waiting:
    """One input and the queue that its vector goes to. Implements serving.engine.output_queue.RunningSequence."""

    input: EncoderInput
    queue: OutputQueue[PoolingOutput]
    index: int
    priority: int
    queued_at: float
    is_cancelled: bool = False
    prompt_progress: tuple[int, int] | None = None

    def send(self, command: SequenceCommand) -> None:
        """See RunningSequence. There is nothing to pause: an input has one output."""
        self.is_cancelled = self.is_cancelled or command == "cancel"


class EncoderEngine:
    """Batches of one encoder. `start` before the first `encode`, `stop` at the end."""

    def __init__(
        self, network: Encoder, limits: EngineLimits, turns: AbstractContextManager[None] | None = None
    ) -> None:
        """limits.max_batch_tokens: of a batch, padding included. turns: entered for each batch."""
        self.network, self.limits = network, limits
        self.num_steps, self.step_size, self.is_busy = 0, 0.0, False  # see MonitoredEngine
        self.queue_seconds: deque[float] = deque(maxlen=4096)  # see MonitoredEngine
        self._turns = turns or nullcontext()
        self._waiting: list[_Waiting] = []  # guarded by _wake
        self._running: list[_Waiting] = []
        self._num_tokens = 0
        self._wake = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """See MonitoredEngine."""
        return self._thread.is_alive() and not self._is_stopping

    def stats(self) -> EngineStats:
        """See MonitoredEngine. An encoder has no cache."""
        return EngineStats(len(self._running), len(self._waiting), 0, 0, 0, 0, self._num_tokens, 0, 0)

    def encode(self, inputs: Sequence[EncoderInput], queue: OutputQueue[PoolingOutput], priority: int = 0) -> None:
        """Start one vector for each input; that of the i-th comes into `queue` as i. In the event loop.

        priority: smaller goes first. Raises EngineStopped if the engine does not run.
        """
        now = time.monotonic()
        added = [_Waiting(each, queue, index, priority, now) for index, each in enumerate(inputs)]
        with self._wake:
            if not self.is_alive:
                raise EngineStopped("the engine is not running")
            self._waiting += added
            self._wake.notify()
        for each in added:
            queue.add(each.index, each)

    def give_up(self) -> None:
        """See MonitoredEngine."""
        with self._wake:
            abandoned = [*self._running, *self._waiting]
        self._deliver([(each, EngineStopped("the engine makes no progress")) for each in abandoned])

    def stop(self, max_seconds: float | None = None) -> None:
        """See MonitoredEngine."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(max_seconds)
        self.give_up()

    # ---- the engine thread ----

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._is_stopping):
                    self.is_busy = False
                    self._wake.wait()
                if self._is_stopping:
                    return
                self.is_busy = True
                self._running = self._next_batch()
            if self._running:
                self._deliver(self._outputs(self._running))
            self._running = []
            self.num_steps += 1

    def _next_batch(self) -> list[_Waiting]:
        """The first that waits and others of similar length, as many as `max_batch_tokens` has rows for."""
        self._waiting = [each for each in self._waiting if not each.is_cancelled]
        if not self._waiting:
            return []
        window = sorted(self._waiting[:MAX_LOOKED_AT], key=lambda each: each.priority)  # stable: in order of arrival
        size = len(window[0].input.token_ids)
        similar = sorted(window[1:], key=lambda each: abs(len(each.input.token_ids) - size))
        batch, longest = [window[0]], size
        for each in similar:
            longest = max(longest, len(each.input.token_ids))
            is_full = (len(batch) + 1) * longest > self.limits.max_batch_tokens
            if is_full or len(batch) == self.limits.max_sequences or longest > MAX_PADDING * size + 8:
                break
            batch.append(each)
        taken = set(map(id, batch))
        self._waiting = [each for each in self._waiting if id(each) not in taken]
        now = time.monotonic()
        self.queue_seconds.extend(now - each.queued_at for each in batch)
        return batch

    def _outputs(self, batch: list[_Waiting]) -> list[tuple[_Waiting, PoolingOutput | EngineError]]:
        """A batch that fails runs again in halves: an input's fault is its own."""
        self.step_size = sum(len(each.input.token_ids) for each in batch) / self.limits.max_batch_tokens
        try:
            with self._turns:
                vectors = self.network.encode([each.input for each in batch])
        except Exception as error:  # noqa: BLE001
            if len(batch) > 1:
                half = len(batch) // 2
                return self._outputs(batch[:half]) + self._outputs(batch[half:])
            logger.error("an input of an encoder failed: %s", where_from(error))
            is_memory = isinstance(error, MemoryError) or "memory" in str(error)
            failure = (
                OutOfMemory("the device ran out of memory") if is_memory else RequestFailed("a fault in the engine")
            )
            return [(batch[0], failure)]
        self._num_tokens += sum(len(each.input.token_ids) for each in batch)
        return [
            (each, PoolingOutput(tuple(vector)) if all(map(math.isfinite, vector)) else NotFinite())
            for each, vector in zip(batch, vectors, strict=True)
        ]

    def _deliver(self, outputs: list[tuple[_Waiting, PoolingOutput | EngineError]]) -> None:
        by_queue: dict[OutputQueue[PoolingOutput], list[tuple[int, PoolingOutput | EngineError]]] = {}
        for each, output in outputs:
            by_queue.setdefault(each.queue, []).append((each.index, output))
        deliver(by_queue)
