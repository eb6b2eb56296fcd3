"""Prompts of one request -> chat events of all their answers, with the request's deadline, permit and metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving import metrics
from serving.admission.admission_control import Permit
from serving.engine.output_queue import OutputQueue
from serving.engine.outputs import TokenOutput
from serving.generation.interface import Finished, IndexedEvent
from serving.generation.output_processor import OutputProcessor
from serving.generation.pipeline import Prompt, RunningModel
from serving.http.request_context import RequestContext


@dataclass(frozen=True)
class Deadline:
    """When a request is given up (time.monotonic(), or infinity), and what its reader then gets."""

    at: float
    failure: Callable[[], Exception]


class EventStream:
    """Events as (index, event); prompt p's answer i has the index p * n + i. For one event loop and one reader.

    Must be closed, which cancels what still runs and releases the permit. Closing does not wait, so a cancelled
    request cannot be interrupted in it.
    """

    def __init__(
        self,
        model: RunningModel,
        prompts: Sequence[Prompt],
        permit: Permit,
        context: RequestContext,
        deadline: Deadline,
    ) -> None:
        """Starts the generation. Raises EngineError, and has released the permit then."""
        self._queue = OutputQueue[TokenOutput]()
        self._processors: list[OutputProcessor] = []
        self._num_open = sum(prompt.n for prompt in prompts)  # answers that are not over
        self._failure: Exception | None = None  # of a processor
        self._metrics = RequestMetrics(context, permit, model.name, sum(len(prompt.token_ids) for prompt in prompts))
        self._loop = self._queue.loop
        self._timer = None
        if deadline.at < math.inf:
            seconds = max(0.0, deadline.at - time.monotonic())
            self._timer = self._loop.call_later(seconds, lambda: self._queue.fail(deadline.failure()))
        try:
            for prompt in prompts:
                self._processors += model.start(prompt, self._queue, len(self._processors), permit.priority)
        except BaseException:
            self.close()
            raise

    async def take(self, timeout_seconds: float | None = None) -> list[IndexedEvent] | None:
        """Every event that is ready, waiting for the first. None at the end, [] when none came in time.

        Raises EngineError or the deadline's failure, once the events before it were taken.
        """
        until = None if timeout_seconds is None else self._loop.time() + timeout_seconds
        while self._failure is None:
            outputs = await self._queue.take(until)
            if not outputs:
                return None if outputs is None else []
            events = self._process(outputs)
            if events:
                return events
        raise self._failure

    def prompt_progress(self) -> tuple[int, int] | None:
        """(prompt tokens that are computed, prompt tokens), or None if the engine does not say."""
        return self._queue.prompt_progress()

    def _process(self, outputs: list[tuple[int, TokenOutput]]) -> list[IndexedEvent]:
        events: list[IndexedEvent] = []
        try:
            for index, output in outputs:
                processor = self._processors[index]
                if processor.is_over:  # by a stop string in an output before this one
                    continue
                events += [(index, event) for event in processor.push(output)]
                if processor.is_over:
                    self._queue.cancel(index)
                    self._num_open -= 1
        except Exception as error:  # noqa: BLE001
            self._failure = error  # `take` raises it after these events
        if events:
            self._metrics.record(events)
        return events

    async def take_all(self) -> list[IndexedEvent]:
        """Every event up to the end. Raises as `take` does."""
        events: list[IndexedEvent] = []
        while (some := await self.take()) is not None:
            events += some
        return events

    def close(self) -> None:
        """Cancel what still runs and release the permit. May be called twice."""
        self._metrics.close(is_complete=self._num_open == 0)
        self._queue.close()
        if self._timer is not None:
            self._timer.cancel()


class RequestMetrics:
    """Counts one request's events into its context, its permit and the metrics."""

    def __init__(self, context: RequestContext, permit: Permit, model: str, num_prompt_tokens: int) -> None:
        self._context, self._permit, self._model = context, permit, model
        self._is_closed = False
        context.prompt_tokens = num_prompt_tokens

    def record(self, events: list[IndexedEvent]) -> None:
        context = self._context
        if context.first_token_at is None:
            context.first_token_at = time.monotonic()
            self._permit.started()
            metrics.TIME_TO_FIRST_TOKEN.labels(self._model).observe(context.first_token_at - context.begun)
        for _, event in events:
            if isinstance(event, Finished):
                context.completion_tokens += event.usage.completion_tokens
                context.cached_tokens += event.usage.cached_tokens
                context.finish_reasons.append(event.reason)

    def close(self, is_complete: bool) -> None:
        """is_complete: every answer was finished; else the request failed or its client left. May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        context = self._context
        self._permit.close(context.prompt_tokens + context.completion_tokens if is_complete else None)
        if not is_complete or context.first_token_at is None:
            return
        now = time.monotonic()
        metrics.REQUEST_LATENCY.labels(self._model).observe(now - context.begun)
        for reason in context.finish_reasons:
            metrics.REQUEST_SUCCESS.labels(self._model, reason).inc()
        num_intervals = context.completion_tokens / max(1, len(context.finish_reasons)) - 1
        if num_intervals > 0:
            metrics.TIME_PER_OUTPUT_TOKEN.labels(self._model).observe((now - context.first_token_at) / num_intervals)
