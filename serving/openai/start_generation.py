"""Accepted prompts of a request -> the stream of their events, after admission. The only way to start a generation."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from starlette.requests import Request
from starlette.types import Scope

from serving.admission.admission_control import Admission, Capacity, Permit
from serving.generation.event_stream import Deadline, EventStream
from serving.generation.pipeline import Prompt, RunningModel
from serving.http.errors import invalid
from serving.http.request_context import RequestContext, header, request_context
from serving.openai.errors import deadline_passed
from serving.openai.limits import ApiLimits

TIMEOUT_HEADER = b"x-request-timeout"
DROPPED_ROUNDS_HEADER = "x-chatglm-dropped-rounds"


class GenerationStarter:
    """Admits requests and starts them in the engine. For one event loop."""

    def __init__(self, admission: Admission, limits: ApiLimits) -> None:
        self._admission = admission
        self._limits = limits

    def open(self, request: Request, model: RunningModel, prompts: Sequence[Prompt]) -> EventStream:
        """The events of all answers to these prompts, to be closed by the caller.

        Raises APIError 429 when the request is not admitted, 400 for a wrong timeout header; EngineError.
        """
        context = request_context(request.scope)
        deadline = _deadline(context, request.scope, self._limits.timeout_seconds)
        permit = self._admit(
            context,
            model,
            num_answers=sum(prompt.n for prompt in prompts),
            num_tokens=sum(len(prompt.token_ids) + prompt.n * prompt.sampling.max_tokens for prompt in prompts),
        )
        num_dropped = sum(prompt.num_dropped_rounds for prompt in prompts)
        if num_dropped:
            context.headers[DROPPED_ROUNDS_HEADER] = str(num_dropped)
        return EventStream(model, prompts, permit, context, deadline)

    @asynccontextmanager
    async def embedding(self, request: Request, model: RunningModel, num_tokens: int) -> AsyncGenerator[None, None]:
        """Admits texts to be embedded and limits the time for it. Raises APIError 429, and 408 or 504 for the time."""
        context = request_context(request.scope)
        deadline = _deadline(context, request.scope, self._limits.timeout_seconds)
        permit = self._admit(context, model, 1, num_tokens)
        context.prompt_tokens = num_tokens
        permit.started()
        try:
            seconds = None if deadline.at == math.inf else deadline.at - time.monotonic()
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise deadline.failure() from None
        finally:
            permit.close(num_tokens)

    def _admit(self, context: RequestContext, model: RunningModel, num_answers: int, num_tokens: int) -> Permit:
        limits = model.engine.limits
        permit = self._admission.admit(
            context.client, num_answers, num_tokens, Capacity(limits.max_sequences, limits.kv_tokens)
        )
        context.headers |= permit.headers
        return permit


def _deadline(context: RequestContext, scope: Scope, server_seconds: float) -> Deadline:
    """The client may ask for less time than the server allows, not for more."""
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
        return Deadline(context.begun + server_seconds, partial(deadline_passed, 504, server_seconds))
    return Deadline(context.begun + seconds, partial(deadline_passed, 408, seconds))
