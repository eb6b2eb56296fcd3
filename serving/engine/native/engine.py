"""Prompts in, one output a step into the queue of each request: an engine thread that schedules, runs and samples.

event loop: generate() -> commands -> engine thread: schedule, run, sample -> outputs, one wake-up of the loop a step
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from serving.engine.interface import (
    CausalLM,
    EngineCapabilities,
    EngineLimits,
    EngineStats,
    PromptLayout,
    SamplingParams,
    TokenMask,
    TrainedPrefix,
)
from serving.engine.native.cuda_graphs import CaptureFunction, DecodeGraphs
from serving.engine.native.device import is_out_of_memory
from serving.engine.native.model_runner import ModelRunner, StepResults
from serving.engine.native.sampler import SampledToken
from serving.engine.native.scheduler import ScheduledSequence, Scheduler, SchedulerOutput, least_prompt_rows
from serving.engine.native.sequence import BLOCK, Command, Request, SequenceState, placeholders
from serving.engine.output_queue import OutputQueue, call_in, deliver
from serving.engine.outputs import (
    EngineError,
    EngineStopped,
    NotFinite,
    OutOfMemory,
    PoolingOutput,
    RequestFailed,
    RequestTooLarge,
    TokenOutput,
    UnknownToken,
)
from serving.safe_traceback import where_from

logger = logging.getLogger(__name__)

Output = TokenOutput | PoolingOutput | EngineError

NOTHING = SamplingParams(max_tokens=0)
STUCK_SECONDS = 0.05  # between steps while everything that could run is paused
MAX_FAILED_STEPS = 3  # in a row in which the device computed nothing at all; then the engine stops


class NativeEngine:
    """Continuous batching over one network. `start` before the first `generate`, `stop` at the end."""

    capabilities = EngineCapabilities()

    def __init__(
        self,
        network: CausalLM,
        limits: EngineLimits,
        capture: CaptureFunction | None = None,
        prefix: TrainedPrefix | None = None,
        turns: AbstractContextManager[None] | None = None,
    ) -> None:
        """capture: see cuda_graphs; None runs each step eagerly. turns: entered for each step."""
        self.limits, self.shape = limits, network.shape
        self._trained = placeholders(prefix.num_tokens if prefix else 0)
        self._turns = turns or nullcontext()
        self._runner = ModelRunner(
            network, limits.kv_tokens, limits.max_sequences, capture, limits.kv_dtype, len(self._trained)
        )
        sizes = limits.max_sequences, limits.max_batch_tokens, limits.kv_tokens
        self._scheduler = Scheduler(*sizes, least_prompt_rows(network.device.type))
        if prefix is not None:
            self._runner.write_prefix(prefix, self._scheduler.blocks.pin(prefix.num_tokens))
        self._requests: dict[SequenceState, Request] = {}  # in flight; changed by the engine thread only
        self._step_outputs: dict[
            OutputQueue[Any], list[tuple[int, Output]]
        ] = {}  # of the present step; the engine thread's
        self._commands: deque[tuple[Request, Command]] = deque()  # guarded by _wake
        self.queue_seconds: deque[float] = deque(maxlen=4096)  # see Engine
        self.num_steps, self.step_size, self.is_busy = 0, 0.0, False  # see Engine
        self._num_generated = 0
        self._wake = threading.Condition()
        self._is_stopping = False
        self._num_failed_steps = 0  # in a row
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def graphs(self) -> DecodeGraphs | None:
        """The captured decode steps; None where nothing is captured."""
        return self._runner.graphs

    @property
    def is_alive(self) -> bool:
        """Whether the engine can still answer."""
        return self._thread.is_alive() and not self._is_stopping

    def start(self) -> None:
        """Ready when it returns; capturing decode steps takes up to a minute."""
        self._runner.warm_up()
        self._thread.start()

    def stop(self, max_seconds: float | None = None) -> None:
        """See Engine."""
        with self._wake:
            self._is_stopping = True
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
            kv_tokens_used=scheduler.blocks.num_used * BLOCK,
            kv_tokens_cached=scheduler.blocks.num_cached * BLOCK,
            kv_tokens_total=scheduler.num_tokens,
            preemptions=scheduler.counters.preemptions,
            prompt_tokens=scheduler.counters.prompt_tokens,
            cached_tokens=scheduler.counters.cached_tokens,
            generated_tokens=self._num_generated,
        )

    def generate(
        self,
        prompt_ids: Sequence[int],
        samplings: Sequence[SamplingParams],
        queue: OutputQueue[TokenOutput],
        first_index: int = 0,
        priority: int = 0,
        masks: Sequence[TokenMask | None] | None = None,
    ) -> None:
        """See Engine. The prompt is computed once for all its answers."""
        self._check(prompt_ids, max(each.max_tokens for each in samplings))
        layout = self._runner.layout(prompt_ids)
        sequences = [
            self._sequence(
                prompt_ids,
                sampling,
                layout,
                priority=priority,
                seed=random.getrandbits(63) if sampling.seed is None else sampling.seed,
                mask=mask,
            )
            for sampling, mask in zip(samplings, masks or [None] * len(samplings), strict=True)
        ]
        self._add(sequences, queue, first_index)

    def embed(self, texts: Sequence[tuple[Sequence[int], range]], queue: OutputQueue[PoolingOutput]) -> None:
        """See Engine."""
        for token_ids, _ in texts:
            self._check(token_ids, 1)
        skipped = len(self._trained)
        shifted = [(ids, range(skipped + counted.start, skipped + counted.stop)) for ids, counted in texts]
        layout = self._runner.layout
        self._add([self._sequence(ids, NOTHING, layout(ids), pooled=counted) for ids, counted in shifted], queue)

    def _sequence(
        self, ids: Sequence[int], sampling: SamplingParams, layout: PromptLayout, **more: Any
    ) -> SequenceState:
        trained = self._trained
        return SequenceState([*trained, *ids], sampling, layout, num_trained=len(trained), **more)

    def give_up(self) -> None:
        """See Engine. From any thread."""
        for queue in {request.queue for request in self._in_flight()}:
            call_in(queue.loop, queue.fail, EngineStopped("the engine makes no progress"))

    def send(self, commands: list[tuple[Request, Command]]) -> None:
        """Pass commands to the engine thread. From any thread. Raises EngineStopped for "add" if it does not run."""
        with self._wake:
            if not self.is_alive and any(command == "add" for _, command in commands):
                raise EngineStopped("the engine is not running")
            self._commands.extend(commands)
            self._wake.notify()

    def _check(self, token_ids: Sequence[int], num_more: int) -> None:
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < self.shape.vocab_size:  # it would fail the step, and all later ones on a GPU
                raise UnknownToken(token_id)
        num_needed, size = len(token_ids) + num_more, self._scheduler.num_tokens - len(self._trained)
        if num_needed > size:
            raise RequestTooLarge(f"it needs {num_needed} tokens of cache, and there are {size}", num_needed, size)

    def _add(self, sequences: list[SequenceState], queue: OutputQueue[Any], first_index: int = 0) -> None:
        requests = [Request(self.send, sequence, queue, first_index + i) for i, sequence in enumerate(sequences)]
        self.send([(request, "add") for request in requests])
        for request in requests:
            queue.add(request.index, request)

    def _in_flight(self) -> list[Request]:
        with self._wake:
            added = [request for request, command in self._commands if command == "add"]
        return [*list(self._requests.values()), *added]

    # ---- the engine thread ----

    def _run(self) -> None:
        try:
            self._run_steps()
        except Exception:
            logger.critical("the engine's own state is broken: it stops", exc_info=True)
        with self._wake:
            self._is_stopping = True
        for request in self._in_flight():
            self._emit(request, EngineStopped("the engine is shutting down"))
        self._deliver()

    def _run_steps(self) -> None:
        while True:
            with self._wake:
                while not (self._commands or self._is_stopping or self._scheduler.has_work()):
                    self.is_busy = False
                    self._wake.wait()
                if self._is_stopping:
                    return
                self.is_busy = True
                commands = list(self._commands)
                self._commands.clear()
            for request, command in commands:
                self._carry_out(request, command)
            if not self._step():
                with self._wake:  # paused sequences hold the blocks that the waiting ones need
                    self._wake.wait_for(lambda: self._commands or self._is_stopping, STUCK_SECONDS)
            self.num_steps += 1
            self._deliver()

    def _carry_out(self, request: Request, command: Command) -> None:
        sequence = request.sequence
        match command:
            case "add":
                sequence.queued_at = time.monotonic()
                self._requests[sequence] = request
                self._scheduler.add(sequence)
            case "cancel":
                self._remove(sequence)
            case "pause" | "resume":
                sequence.is_paused = command == "pause"

    def _step(self) -> bool:
        """Run one step; False if there was nothing to compute."""
        step = self._scheduler.schedule()
        if not step.scheduled:
            return False
        now = time.monotonic()
        for each in step.scheduled:
            if each.sequence.queued_at is not None:
                self.queue_seconds.append(now - each.sequence.queued_at)
                each.sequence.queued_at = None
        self.step_size = sum(each.num_rows for each in step.scheduled) / self.limits.max_batch_tokens
        with self._turns:
            if not self._copy(step):
                return True
            if self._run_isolated(step):
                self._num_failed_steps = 0
            else:
                self._check_device(step)
        return True

    def _run_isolated(self, step: SchedulerOutput, is_whole: bool = True) -> int:
        """Run a step and emit its outputs. If it fails, it runs again without its newest sequence, and what still fails
        in halves; only a sequence that fails alone gets an error. Returns the number of sequences that did not fail.

        A failed step has written nothing but its own rows in the cache, which the next attempt writes again.
        """
        begun, size = time.monotonic(), len(step.scheduled)
        try:
            results = self._runner.run(step)
        except Exception as error:  # noqa: BLE001
            self._runner.recover(each.sequence for each in step.scheduled)
            results = None
            if size == 1:
                self._fail(step.scheduled[0].sequence, error)
            else:
                logger.error("a step of %d sequences failed, it runs again in parts: %s", size, where_from(error))
        num_succeeded = 0
        if results is not None:
            seconds = time.monotonic() - begun
            self._scheduler.pacer.observe(len(step.decoding), step.num_prompt_rows, seconds)
            num_succeeded = self._process(step, results)
        elif size > 1:
            newer, older = step.split(size - 1 if is_whole else size // 2)
            num_succeeded = self._run_isolated(older, False) + self._run_isolated(newer, False)
        if not is_whole:  # the outputs need not wait for the other parts; the health monitor takes each for progress
            self.num_steps += 1
            self._deliver()
        return num_succeeded

    def _copy(self, step: SchedulerOutput) -> bool:
        """Copy blocks. False if that failed: then the sequences that need them start again."""
        try:
            self._runner.copy(step.copies)
        except Exception:
            logger.exception("keys and values could not be copied; the sequences that need them start again")
            self._scheduler.restart(step.copies)
            return False
        return True

    def _process(self, step: SchedulerOutput, results: StepResults) -> int:
        """Record what was computed and emit the outputs. Returns the number of sequences that did not fail."""
        for each in step.scheduled:
            self._scheduler.computed(each)
        num_failed = 0
        for each, result in results:
            if isinstance(result, PoolingOutput):
                is_finite = math.isfinite(sum(result.vector))
                self._emit(self._requests[each.sequence], result if is_finite else NotFinite())
                self._remove(each.sequence)
            else:
                num_failed += result[0].is_fault
                self._append_all(each, result)
        return len(step.scheduled) - num_failed

    def _append_all(self, scheduled: ScheduledSequence, sampled: list[SampledToken]) -> None:
        """Append the token after the scheduled rows, then the one after each draft token, up to the first wrong one."""
        sequence, num_accepted = scheduled.sequence, 0
        self._append(sequence, sampled[0])
        for draft_id, before, after in zip(scheduled.draft, sampled, sampled[1:], strict=False):
            if draft_id != before.token_id or sequence.state == "finished":
                break
            self._scheduler.advance(sequence, 1)  # the draft token's row is in the cache already
            num_accepted += 1
            self._append(sequence, after)
        if scheduled.draft and sequence.lookup is not None:
            sequence.lookup.observe(len(sequence.token_ids), num_accepted)

    def _append(self, sequence: SequenceState, sampled: SampledToken) -> None:
        request = self._requests[sequence]
        if sampled.token_id is None:
            self._emit(request, RequestFailed("its sampler raised") if sampled.is_fault else NotFinite())
            self._remove(sequence, keep_prefix=False)
            return
        if sequence.mask is not None:
            try:
                sequence.mask.accept(sampled.token_id)
            except Exception as error:  # noqa: BLE001
                logger.error("the mask of one request failed: %s", where_from(error))
                self._emit(request, RequestFailed("its mask refused a token"))
                self._remove(sequence)
                return
        self._num_generated += 1
        reason = sequence.append(sampled.token_id)
        self._emit(request, TokenOutput(sampled.token_id, reason, sampled.logprob, sequence.num_cached_tokens))
        if reason:
            self._remove(sequence)

    def _fail(self, sequence: SequenceState, error: Exception) -> None:
        """The step of this sequence alone has failed."""
        if is_out_of_memory(error):
            logger.error("a step of one sequence ran out of memory: %s", error)
            failure: RequestFailed = OutOfMemory("the device ran out of memory")
        else:
            logger.error("a step of one sequence failed", exc_info=error)
            failure = RequestFailed("a fault in the engine ended this request")
        self._emit(self._requests[sequence], failure)
        self._remove(sequence, keep_prefix=False)

    def _check_device(self, step: SchedulerOutput) -> None:
        """Every sequence of a step has failed alone: either they are all at fault, or the device is."""
        used = {token_id for each in step.scheduled for token_id in each.sequence.token_ids}
        is_working = self._runner.can_compute(next((i for i in range(self.shape.num_tokens) if i not in used), 0))
        self._num_failed_steps = 0 if is_working else self._num_failed_steps + 1
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            logger.critical("nothing could be computed in %d steps in a row: the engine stops", self._num_failed_steps)
            self._is_stopping = True

    def _remove(self, sequence: SequenceState, keep_prefix: bool = True) -> None:
        if self._requests.pop(sequence, None) is None:
            return  # it finished while its client was leaving
        self._scheduler.finish(sequence, keep_prefix)
        self._runner.forget(sequence)

    def _emit(self, request: Request, output: Output) -> None:
        self._step_outputs.setdefault(request.queue, []).append((request.index, output))

    def _deliver(self) -> None:
        outputs, self._step_outputs = self._step_outputs, {}
        deliver(outputs)
