"""The engine's two sides: an async front that any task may call, and one thread that owns the device.

generate() ──► inbox ──► receive ► schedule ► run ► deliver ──► one wake-up of the event loop a step ──► Generation
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import threading
from collections import deque
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar, cast

from serving.engine.runner import Runner
from serving.engine.sampler import Sampled
from serving.engine.scheduler import Scheduler, Work
from serving.engine.sequence import Sequence
from serving.engine.types import (
    CausalLM,
    EngineError,
    EngineLimits,
    EngineStopped,
    Pooled,
    RequestFailed,
    RequestTooLarge,
    SamplingParams,
    Step,
)

logger = logging.getLogger(__name__)

Mail = Step | Pooled | EngineError
ResultT = TypeVar("ResultT", Step, Pooled)

NOT_FINITE = "the model produced numbers that are not finite"
MAX_FAILED_STEPS = 3  # in a row; then the engine declares itself dead


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence and where its steps go."""

    sequence: Sequence
    generation: Generation[Any]
    choice: int


class Generation(Generic[ResultT]):
    """The answers to one prompt, as an async iterator of (choice, step); or the vectors of several texts, as (text,
    vector). Use as an async context: leaving cancels what is still running.

    Raises RequestFailed for a fault of this request alone and EngineStopped if the engine ends first.
    """

    def __init__(self, engine: Engine, sequences: list[Sequence]) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._open = {i: Request(sequence, self, i) for i, sequence in enumerate(sequences)}
        self._mailbox: deque[tuple[int, Mail]] = deque()
        self._arrived = asyncio.Event()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    async def __aenter__(self) -> Self:
        self._engine.send([(request, True) for request in self._open.values()])
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel(*self._open)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, ResultT]:
        while self._open:
            while not self._mailbox:
                self._arrived.clear()
                await self._arrived.wait()
            choice, step = self._mailbox.popleft()
            if choice not in self._open:
                continue  # it was cancelled while this was under way
            if isinstance(step, EngineError):
                del self._open[choice]
                raise step
            if step.finish_reason:
                del self._open[choice]
            return choice, cast("ResultT", step)
        raise StopAsyncIteration

    def cancel(self, *choices: int) -> None:
        """No more steps of these choices are wanted; their places are free within two steps of the engine."""
        self._engine.send([(self._open.pop(choice), False) for choice in choices])

    def put(self, mail: list[tuple[int, Mail]]) -> None:
        """Called in the event loop, once a step."""
        self._mailbox.extend(mail)
        self._arrived.set()


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of what the engine is doing."""

    num_running: int
    num_waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int


class Engine:
    """Continuous batching over one network. `start` before the first `generate`, `stop` at the end."""

    def __init__(self, network: CausalLM, limits: EngineLimits) -> None:
        self.limits = limits
        self.shape = network.shape
        self._runner = Runner(network, limits.kv_tokens)
        self._scheduler = Scheduler(limits.max_sequences, limits.max_batch_tokens, limits.kv_tokens)
        self._requests: dict[Sequence, Request] = {}  # the engine thread's
        self._outbox: dict[Generation[Any], list[tuple[int, Mail]]] = {}
        self._inbox: deque[tuple[Request, bool]] = deque()  # see `send`
        self._wake = threading.Condition()
        self._stopping = False
        self._failed_steps = 0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether the engine can still answer."""
        return self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; requests in flight get EngineStopped."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_tokens_used=scheduler.space.num_used - scheduler.num_idle_tokens,
            kv_tokens_total=scheduler.space.size,
            preemptions=scheduler.counters.preemptions,
            prompt_tokens=scheduler.counters.prompt_tokens,
            cached_tokens=scheduler.counters.cached_tokens,
        )

    def generate(self, prompt_ids: Ids[int], samplings: Ids[SamplingParams], priority: int = 0) -> Generation[Step]:
        """One answer for each of `samplings`; the prompt is computed once. To be entered with `async with`.

        Raises RequestTooLarge if prompt and answer can never fit.
        """
        needed = len(prompt_ids) + max(sampling.max_tokens for sampling in samplings)
        if needed > self._scheduler.space.size:
            raise RequestTooLarge(
                f"prompt and answer need {needed} tokens of cache, and there are {self._scheduler.space.size}"
            )
        layout = self._runner.layout(prompt_ids)
        sequences = [
            Sequence(
                list(prompt_ids),
                sampling,
                layout=layout,
                priority=priority,
                seed=random.getrandbits(63) if sampling.seed is None else sampling.seed,
            )
            for sampling in samplings
        ]
        return Generation(self, sequences)

    def embed(self, texts: Ids[tuple[Ids[int], range]]) -> Generation[Pooled]:
        """For each text, as token ids and the range of those that count, the mean of its hidden states. To be entered
        with `async with`.

        Raises RequestTooLarge if a text can never fit.
        """
        longest = max(len(token_ids) for token_ids, _ in texts) + 1
        if longest > self._scheduler.space.size:
            raise RequestTooLarge(
                f"the text needs {longest} tokens of cache, and there are {self._scheduler.space.size}"
            )
        nothing = SamplingParams(max_tokens=0)
        return Generation(
            self,
            [Sequence(list(ids), nothing, self._runner.layout(ids), pooled=counted) for ids, counted in texts],
        )

    def send(self, messages: list[tuple[Request, bool]]) -> None:
        """Put messages of (request, whether it is new; else it leaves) into the inbox. From any thread."""
        if not messages:
            return
        with self._wake:
            if not self.is_alive and any(is_new for _, is_new in messages):
                raise EngineStopped("the engine is not running")
            self._inbox.extend(messages)
            self._wake.notify()

    # ---- the engine thread ----

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self._stopping or self._scheduler.has_work()):
                    self._wake.wait()
                if self._stopping:
                    break
                arrivals = list(self._inbox)
                self._inbox.clear()
            self._receive(arrivals)
            self._step()
            self._deliver()
        with self._wake:
            arrivals = list(self._inbox)
        for request in {*self._requests.values(), *(request for request, is_new in arrivals if is_new)}:
            self._post(request, EngineStopped("the engine is shutting down"))
        self._deliver()

    def _receive(self, arrivals: list[tuple[Request, bool]]) -> None:
        for request, is_new in arrivals:
            if is_new:
                self._requests[request.sequence] = request
                self._scheduler.add(request.sequence)
            else:
                self._drop(request.sequence)

    def _step(self) -> None:
        plan = self._scheduler.schedule()
        if not plan.work:
            return
        try:
            results = self._runner.run(plan)
        except Exception:
            # whatever it was, the cache may be half written: these requests fail, the others start again
            logger.exception("a step of %d sequences failed", len(plan.work))
            self._fail(plan.work)
            return
        self._failed_steps = 0
        for work in plan.work:
            self._scheduler.computed(work)
        for work, result in results:
            if isinstance(result, Pooled):
                self._hand_over(work.sequence, result)
            else:
                self._take(work.sequence, result)

    def _hand_over(self, sequence: Sequence, pooled: Pooled) -> None:
        is_finite = math.isfinite(sum(pooled.vector))
        self._post(self._requests[sequence], pooled if is_finite else RequestFailed(NOT_FINITE))
        self._drop(sequence)

    def _take(self, sequence: Sequence, sampled: Sampled) -> None:
        request = self._requests[sequence]
        if sampled.token_id is None:
            self._post(request, RequestFailed(NOT_FINITE))
            self._drop(sequence, keep_prefix=False)
            return
        reason = sequence.append(sampled.token_id)
        self._post(request, Step(sampled.token_id, reason, sampled.logprob, sequence.num_cached_tokens))
        if reason:
            self._drop(sequence)

    def _fail(self, work: tuple[Work, ...]) -> None:
        self._failed_steps += 1
        for item in work:
            self._post(self._requests[item.sequence], RequestFailed("a fault in the engine ended this request"))
            self._drop(item.sequence, keep_prefix=False)
        self._scheduler.forget_cache()
        if self._failed_steps >= MAX_FAILED_STEPS:
            logger.critical("%d steps in a row failed: the engine stops", self._failed_steps)
            self._stopping = True

    def _drop(self, sequence: Sequence, keep_prefix: bool = True) -> None:
        if self._requests.pop(sequence, None) is None:
            return  # it finished while its client was leaving
        self._scheduler.finish(sequence, keep_prefix)
        self._runner.forget(sequence)

    def _post(self, request: Request, step: Mail) -> None:
        self._outbox.setdefault(request.generation, []).append((request.choice, step))

    def _deliver(self) -> None:
        """Hand a whole step's tokens to each event loop with one wake-up."""
        by_loop: dict[asyncio.AbstractEventLoop, dict[Generation[Any], list[tuple[int, Mail]]]] = {}
        for generation, mail in self._outbox.items():
            by_loop.setdefault(generation.loop, {})[generation] = mail
        self._outbox.clear()
        for loop, bags in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put, bags)
            except RuntimeError:
                logger.debug("an event loop closed before its answers came")


def _put(mail: dict[Generation[Any], list[tuple[int, Mail]]]) -> None:
    for generation, steps in mail.items():
        generation.put(steps)
