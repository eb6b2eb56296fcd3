"""The engine's two sides: an async front that any task may call, and one thread that owns the device.

generate() ──► inbox ──► receive ► schedule ► run ► deliver ──► one wake-up of the event loop a step ──► Generation
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Self, TypeVar, cast

from serving.engine.interface import (
    CausalLM,
    EngineCapabilities,
    EngineError,
    EngineLimits,
    EngineStats,
    EngineStopped,
    NotFinite,
    OutOfMemory,
    PoolingOutput,
    RequestFailed,
    RequestTooLarge,
    SamplingParams,
    TokenMask,
    TokenOutput,
)
from serving.engine.native.cuda_graphs import DecodeGraphs, Recorder
from serving.engine.native.device import is_out_of_memory
from serving.engine.native.model_runner import ModelRunner
from serving.engine.native.sampler import SampledToken
from serving.engine.native.scheduler import ScheduledSequence, Scheduler
from serving.engine.native.sequence import SequenceState
from serving.safe_traceback import where_from

logger = logging.getLogger(__name__)

Mail = TokenOutput | PoolingOutput | EngineError
ResultT = TypeVar("ResultT", TokenOutput, PoolingOutput)

News = Literal["new", "leave", "pause", "resume"]
MAX_UNREAD = 512  # steps that wait for one generation's reader
STUCK_SECONDS = 0.05  # between looks when only a reader can bring things forward
MAX_FAILED_STEPS = 3  # in a row; then the engine declares itself dead


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence and where its steps go."""

    sequence: SequenceState
    generation: Generation[Any]
    choice: int


class Generation(Generic[ResultT]):
    """The answers to one prompt, as an async iterator of (choice, step); or the vectors of several texts, as (text,
    vector). Use as an async context: leaving cancels what is still running.

    Raises RequestFailed for a fault of this request alone and EngineStopped if the engine ends first.
    Steps that nobody reads do not pile up: past MAX_UNREAD the sequences are paused until the reader has caught up.
    """

    def __init__(self, engine: NativeEngine, sequences: list[SequenceState]) -> None:
        self._engine = engine
        self._is_paused = False
        self._loop = asyncio.get_running_loop()
        self._open = {i: Request(sequence, self, i) for i, sequence in enumerate(sequences)}
        self._mailbox: deque[tuple[int, Mail]] = deque()
        self._arrived = asyncio.Event()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    async def __aenter__(self) -> Self:
        self._engine.send([(request, "new") for request in self._open.values()])
        self._engine.generations.add(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._engine.generations.discard(self)
        self.cancel(*self._open)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, ResultT]:
        while self._open:
            while not self._mailbox:
                self._arrived.clear()
                await self._arrived.wait()
            choice, step = self._mailbox.popleft()
            if self._is_paused and len(self._mailbox) <= MAX_UNREAD // 4:
                self._is_paused = False
                self._engine.send([(request, "resume") for request in self._open.values()])
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
        self._engine.send([(self._open.pop(choice), "leave") for choice in choices])

    def put(self, mail: list[tuple[int, Mail]]) -> None:
        """Called in the event loop, once a step."""
        self._mailbox.extend(mail)
        self._arrived.set()
        if len(self._mailbox) > MAX_UNREAD and not self._is_paused:
            self._is_paused = True
            self._engine.send([(request, "pause") for request in self._open.values()])

    def give_up(self) -> None:
        """Called in the event loop: the engine is not waited for any longer; should it go on, it must not do this."""
        self._engine.send([(request, "leave") for request in self._open.values()])
        self.put([(choice, EngineStopped("the engine makes no progress")) for choice in self._open])


class NativeEngine:
    """Continuous batching over one network. `start` before the first `generate`, `stop` at the end."""

    capabilities = EngineCapabilities()

    def __init__(self, network: CausalLM, limits: EngineLimits, record: Recorder | None = None) -> None:
        """record: how decode steps are recorded, see cuda_graphs; None computes each step anew."""
        self.limits = limits
        self.shape = network.shape
        self._runner = ModelRunner(network, limits.kv_tokens, limits.max_sequences, record, limits.kv_dtype)
        self._scheduler = Scheduler(limits.max_sequences, limits.max_batch_tokens, limits.kv_tokens)
        self._requests: dict[SequenceState, Request] = {}  # the engine thread's
        self._outbox: dict[Generation[Any], list[tuple[int, Mail]]] = {}
        self._inbox: deque[tuple[Request, News]] = deque()  # see `send`
        self.generations: set[Generation[Any]] = set()  # those being read; the event loop's
        self.queue_seconds: deque[float] = deque(maxlen=4096)  # of sequences that got their first rows; a reader pops
        self.num_steps = 0  # ended steps: whoever watches sees progress
        self.is_busy = False  # whether there was work when the engine looked last
        self._num_generated = 0
        self._wake = threading.Condition()
        self._stopping = False
        self._failed_steps = 0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether the engine can still answer."""
        return self._thread.is_alive() and not self._stopping

    @property
    def graphs(self) -> DecodeGraphs | None:
        """What is recorded of decode steps, where anything is."""
        return self._runner.graphs

    def start(self) -> None:
        """Ready when it returns; recording decode steps takes part of a minute."""
        self._runner.prepare()
        self._thread.start()

    def stop(self, max_seconds: float | None = None) -> None:
        """End the thread after its current step; requests in flight get EngineStopped.

        max_seconds: do not wait longer than this for the step; the requests are told nevertheless.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(max_seconds)
        if self._thread.is_alive():
            self.give_up()

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
            generated_tokens=self._num_generated,
        )

    def generate(
        self,
        prompt_ids: Sequence[int],
        samplings: Sequence[SamplingParams],
        priority: int = 0,
        masks: Sequence[TokenMask | None] | None = None,
    ) -> Generation[TokenOutput]:
        """One answer for each of `samplings`; the prompt is computed once. To be entered with `async with`.

        masks: one for each answer; None lets every token pass. Each belongs to the engine thread from here on.
        Raises RequestTooLarge if prompt and answer can never fit.
        """
        needed = len(prompt_ids) + max(sampling.max_tokens for sampling in samplings)
        if needed > self._scheduler.space.size:
            size = self._scheduler.space.size
            raise RequestTooLarge(
                f"prompt and answer need {needed} tokens of cache, and there are {size}", needed, size
            )
        layout = self._runner.layout(prompt_ids)
        sequences = [
            SequenceState(
                list(prompt_ids),
                sampling,
                layout=layout,
                priority=priority,
                seed=random.getrandbits(63) if sampling.seed is None else sampling.seed,
                mask=mask,
            )
            for sampling, mask in zip(samplings, masks or [None] * len(samplings), strict=True)
        ]
        return Generation(self, sequences)

    def embed(self, texts: Sequence[tuple[Sequence[int], range]]) -> Generation[PoolingOutput]:
        """For each text, as token ids and the range of those that count, the mean of its hidden states. To be entered
        with `async with`.

        Raises RequestTooLarge if a text can never fit.
        """
        longest = max(len(token_ids) for token_ids, _ in texts) + 1
        if longest > self._scheduler.space.size:
            size = self._scheduler.space.size
            raise RequestTooLarge(f"the text needs {longest} tokens of cache, and there are {size}", longest, size)
        nothing = SamplingParams(max_tokens=0)
        return Generation(
            self,
            [SequenceState(list(ids), nothing, self._runner.layout(ids), pooled=counted) for ids, counted in texts],
        )

    def give_up(self) -> None:
        """End every request in flight from outside, for an engine thread that hangs in a step. From any thread."""
        for generation in list(self.generations):
            generation.loop.call_soon_threadsafe(generation.give_up)

    def send(self, messages: list[tuple[Request, News]]) -> None:
        """Put messages of (request, what is new of it) into the inbox. From any thread."""
        if not messages:
            return
        with self._wake:
            if not self.is_alive and any(news == "new" for _, news in messages):
                raise EngineStopped("the engine is not running")
            self._inbox.extend(messages)
            self._wake.notify()

    # ---- the engine thread ----

    def _loop(self) -> None:
        try:
            self._serve()
        except Exception:
            logger.critical("the engine's own state is broken: it stops", exc_info=True)
        with self._wake:
            self._stopping = True
            arrivals = list(self._inbox)
        for request in {*self._requests.values(), *(request for request, news in arrivals if news == "new")}:
            self._post(request, EngineStopped("the engine is shutting down"))
        self._deliver()

    def _serve(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self._stopping or self._scheduler.has_work()):
                    self.is_busy = False
                    self._wake.wait()
                if self._stopping:
                    return
                self.is_busy = True
                arrivals = list(self._inbox)
                self._inbox.clear()
            self._receive(arrivals)
            if not self._step():
                with self._wake:  # paused sequences hold the room that the waiting ones need
                    self._wake.wait_for(lambda: self._inbox or self._stopping, STUCK_SECONDS)
            self.num_steps += 1
            self._deliver()

    def _receive(self, arrivals: list[tuple[Request, News]]) -> None:
        for request, news in arrivals:
            sequence = request.sequence
            match news:
                case "new":
                    sequence.queued_at = time.monotonic()
                    self._requests[sequence] = request
                    self._scheduler.add(sequence)
                case "leave":
                    self._drop(sequence)
                case "pause" | "resume":
                    sequence.is_paused = news == "pause"

    def _step(self) -> bool:
        """Carry out one step; False if nothing could be done."""
        plan = self._scheduler.schedule()
        if not plan.work:
            return False
        self._note_first_rows(plan.work)
        begun = time.monotonic()
        try:
            results = self._runner.run(plan)
        except Exception as error:  # noqa: BLE001
            # whatever it was, the cache may be half written: these requests fail, the others start again
            self._fail(plan.work, error)
            return True
        self._failed_steps = 0
        self._scheduler.pacer.observe(len(plan.decoding), plan.num_prompt_rows, time.monotonic() - begun)
        for work in plan.work:
            self._scheduler.computed(work)
        for work, result in results:
            if isinstance(result, PoolingOutput):
                self._hand_over(work.sequence, result)
            else:
                self._take_all(work, result)
        return True

    def _note_first_rows(self, work: tuple[ScheduledSequence, ...]) -> None:
        for item in work:
            if item.sequence.queued_at is not None:
                self.queue_seconds.append(time.monotonic() - item.sequence.queued_at)
                item.sequence.queued_at = None

    def _hand_over(self, sequence: SequenceState, pooled: PoolingOutput) -> None:
        is_finite = math.isfinite(sum(pooled.vector))
        self._post(self._requests[sequence], pooled if is_finite else NotFinite())
        self._drop(sequence)

    def _take_all(self, work: ScheduledSequence, sampled: list[SampledToken]) -> None:
        """The token after the work's rows; then, as long as the draft guessed right, the one after each guess."""
        sequence, num_accepted = work.sequence, 0
        self._take(sequence, sampled[0])
        for guess, before, after in zip(work.draft, sampled, sampled[1:], strict=False):
            if guess != before.token_id or sequence.state == "finished":
                break
            sequence.num_computed += 1  # the guess's row is in the cache already
            num_accepted += 1
            self._take(sequence, after)
        if work.draft and sequence.lookup is not None:
            sequence.lookup.learn(len(sequence.token_ids), num_accepted)

    def _take(self, sequence: SequenceState, sampled: SampledToken) -> None:
        request = self._requests[sequence]
        if sampled.token_id is None:
            self._post(request, RequestFailed("its sampler raised") if sampled.is_fault else NotFinite())
            self._drop(sequence, keep_prefix=False)
            return
        if sequence.mask is not None:
            try:
                sequence.mask.accept(sampled.token_id)
            except Exception as error:  # noqa: BLE001
                logger.error("the mask of one request failed: %s", where_from(error))
                self._post(request, RequestFailed("its mask refused a token"))
                self._drop(sequence)
                return
        self._num_generated += 1
        reason = sequence.append(sampled.token_id)
        self._post(request, TokenOutput(sampled.token_id, reason, sampled.logprob, sequence.num_cached_tokens))
        if reason:
            self._drop(sequence)

    def _fail(self, work: tuple[ScheduledSequence, ...], error: Exception) -> None:
        if is_out_of_memory(error):
            logger.error("a step of %d sequences ran out of memory: %s", len(work), error)
            failure: RequestFailed = OutOfMemory("the device ran out of memory")
        else:
            logger.error("a step of %d sequences failed", len(work), exc_info=error)
            failure = RequestFailed("a fault in the engine ended this request")
        self._failed_steps += 1
        for item in work:
            self._post(self._requests[item.sequence], failure)
            self._drop(item.sequence, keep_prefix=False)
        self._scheduler.forget_cache()
        self._runner.recover()
        if self._failed_steps >= MAX_FAILED_STEPS:
            logger.critical("%d steps in a row failed: the engine stops", self._failed_steps)
            self._stopping = True

    def _drop(self, sequence: SequenceState, keep_prefix: bool = True) -> None:
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
