"""From accepted prompts to a feed of events: admission, order, deadline, counting. The one way to a generation."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from starlette.requests import Request
from starlette.types import Scope

from serving import metrics
from serving.admission.admission_control import Admission, Capacity, Permit
from serving.generation.event_stream import Deadline, EventStream
from serving.generation.interface import ChatEvent, Finished
from serving.generation.pipeline import Prompt, RunningModel
from serving.http.errors import invalid
from serving.http.request_context import RequestContext, header, request_context
from serving.openai.errors import deadline_passed
from serving.openai.limits import ApiLimits

TIMEOUT_HEADER = b"x-request-timeout"
DROPPED_ROUNDS_HEADER = "x-chatglm-dropped-rounds"


class GenerationStarter:
    """Lets requests into the engine. For one event loop."""

    def __init__(self, admission: Admission, limits: ApiLimits) -> None:
        self._admission = admission
        self._limits = limits

    def open(self, request: Request, model: RunningModel, prompts: Sequence[Prompt]) -> EventStream:
        """The events of all the answers to these prompts. Raises APIError 429 when there is no room, 400 for a wrong
        timeout header. The feed must be closed, which also gives the room back."""
        record = request_context(request.scope)
        deadline = _deadline(record, request.scope, self._limits.timeout_seconds)
        ticket = self._admit(
            record,
            model,
            num_answers=sum(prompt.n for prompt in prompts),
            num_tokens=sum(len(prompt.token_ids) + prompt.n * prompt.sampling.max_tokens for prompt in prompts),
        )
        num_dropped = sum(prompt.num_dropped_rounds for prompt in prompts)
        if num_dropped:
            record.headers[DROPPED_ROUNDS_HEADER] = str(num_dropped)
        meter = RequestMetrics(record, ticket, num_prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts))
        sources = [model.complete(prompt, ticket.priority) for prompt in prompts]
        return EventStream(sources, prompts[0].n, self._limits.max_ready_events, meter, deadline)

    @asynccontextmanager
    async def embedding(self, request: Request, model: RunningModel, num_tokens: int) -> AsyncGenerator[None, None]:
        """Room for texts to be embedded, and the time for it. Raises APIError 429, and 408 or 504 when time is up."""
        record = request_context(request.scope)
        deadline = _deadline(record, request.scope, self._limits.timeout_seconds)
        ticket = self._admit(record, model, 1, num_tokens)
        record.prompt_tokens = num_tokens
        ticket.started()
        try:
            seconds = None if deadline.at == math.inf else deadline.at - time.monotonic()
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise deadline.failure from None
        finally:
            ticket.close(num_tokens)

    def _admit(self, record: RequestContext, model: RunningModel, num_answers: int, num_tokens: int) -> Permit:
        limits = model.engine.limits
        ticket = self._admission.admit(
            record.client, num_answers, num_tokens, Capacity(limits.max_sequences, limits.kv_tokens)
        )
        record.headers |= ticket.headers
        return ticket


class RequestMetrics:
    """Sees every event of one request and keeps its record, its ticket and the metrics up to date."""

    def __init__(self, record: RequestContext, ticket: Permit, num_prompt_tokens: int) -> None:
        self._record = record
        self._ticket = ticket
        self._is_over = False
        record.prompt_tokens = num_prompt_tokens

    def push(self, event: ChatEvent) -> None:
        record = self._record
        if record.first_token_at is None:
            record.first_token_at = time.monotonic()
            self._ticket.started()
            metrics.TIME_TO_FIRST_TOKEN.observe(record.first_token_at - record.begun)
        if isinstance(event, Finished):
            record.completion_tokens += event.usage.completion_tokens
            record.cached_tokens += event.usage.cached_tokens
            record.finish_reasons.append(event.reason)

    def close(self, is_complete: bool) -> None:
        """is_complete: every answer came to its end; else the request failed or its client left."""
        if self._is_over:
            return
        self._is_over = True
        record = self._record
        self._ticket.close(record.prompt_tokens + record.completion_tokens if is_complete else None)
        if not is_complete or record.first_token_at is None:
            return
        now = time.monotonic()
        metrics.REQUEST_LATENCY.observe(now - record.begun)
        for reason in record.finish_reasons:
            metrics.REQUEST_SUCCESS.labels(reason).inc()
        num_steps = record.completion_tokens / max(1, len(record.finish_reasons)) - 1
        if num_steps > 0:
            metrics.TIME_PER_OUTPUT_TOKEN.observe((now - record.first_token_at) / num_steps)


def _deadline(record: RequestContext, scope: Scope, server_seconds: float) -> Deadline:
    """The client may ask for less than the server allows, not for more."""
    given = header(scope, TIMEOUT_HEADER)
    seconds = server_seconds
    if given is not None:
        try:
            seconds = float(given)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < math.inf:
            raise invalid("The header 'x-request-timeout' must be a number of seconds greater than 0.", None)
    if seconds >= server_seconds:
        return Deadline(record.begun + server_seconds, deadline_passed(504, server_seconds))
    return Deadline(record.begun + seconds, deadline_passed(408, seconds))
