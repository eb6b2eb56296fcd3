"""Accepted prompts of a request -> the stream of their events, after admission. The only way to start a generation."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Self

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

    def admit(self, request: Request, model: RunningModel, num_answers: int) -> AdmittedRequest:
        """Before any work is done for a request. A context manager: at its end the request is over, unless `open` was
        called. num_answers: 0 for requests that the engine has nothing to do for.

        Raises APIError 429 when the request is not admitted, 400 for a wrong timeout header.
        """
        context = request_context(request.scope)
        deadline = _deadline(context, request.scope, self._limits.timeout_seconds)
        limits = model.engine.limits
        capacity = Capacity(limits.max_sequences, limits.kv_tokens)
        permit = self._admission.admit(context.client, num_answers, capacity)
        context.headers |= permit.headers
        return AdmittedRequest(context, model, deadline, permit)


@dataclass
class AdmittedRequest:
    """A request with a permit, while its prompt is built."""

    _context: RequestContext
    _model: RunningModel
    _deadline: Deadline
    _permit: Permit
    _is_open: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_open:
            self._permit.close(0)

    def open(self, prompts: Sequence[Prompt]) -> EventStream:
        """The events of all answers to these prompts, to be closed by the caller. Raises APIError 429; EngineError."""
        self._claim(sum(len(prompt.token_ids) + prompt.n * prompt.sampling.max_tokens for prompt in prompts))
        num_dropped = sum(prompt.num_dropped_rounds for prompt in prompts)
        if num_dropped:
            self._context.headers[DROPPED_ROUNDS_HEADER] = str(num_dropped)
        self._is_open = True  # the stream closes the permit, also where it cannot be started
        return EventStream(self._model, prompts, self._permit, self._context, self._deadline)

    @asynccontextmanager
    async def embedding(self, num_tokens: int) -> AsyncGenerator[None, None]:
        """Limits the time for texts to be embedded. Raises APIError 429, and 408 or 504 for the time."""
        self._claim(num_tokens)
        self._context.prompt_tokens = num_tokens
        self._permit.started()
        self._is_open = True
        try:
            seconds = None if self._deadline.at == math.inf else self._deadline.at - time.monotonic()
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise self._deadline.failure() from None
        finally:
            self._permit.close(num_tokens)

    def _claim(self, num_tokens: int) -> None:
        self._permit.claim(num_tokens)
        self._context.headers |= self._permit.headers


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
