"""A request's model name and prompts -> the loaded model, and after admission the stream of its events."""

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
from serving.openai import errors
from serving.openai.limits import ApiLimits
from serving.openai.streaming import unless_disconnected
from serving.registry import Ability, ModelRegistry, Running, ServedModel

TIMEOUT_HEADER = b"x-request-timeout"
DROPPED_ROUNDS_HEADER = "x-chatglm-dropped-rounds"


class GenerationStarter:
    """Finds the models of requests, admits the requests and starts them in the engine. For one event loop."""

    def __init__(self, registry: ModelRegistry, admission: Admission, limits: ApiLimits) -> None:
        self._registry = registry
        self._admission = admission
        self._limits = limits

    async def chat_model(self, request: Request, name: str, is_stream: bool = False) -> RunningModel:
        """As `model`, for requests that generate."""
        model = await self.model(request, name, "chat", is_stream)
        assert isinstance(model, RunningModel)
        return model

    async def model(self, request: Request, name: str, ability: Ability, is_stream: bool = False) -> Running:
        """The model of this name, loaded. It is safe from being unloaded until the event loop's next turn, and from
        `admit` on for as long as the request runs.

        is_stream: while the model loads, the router answers with comments. Raises APIError 404 for a name that is not
        served, 400 for a model that cannot do this, 503 while it is not loaded.
        """
        served = self._registry.find(name)
        if served is None:
            raise errors.model_not_found(name, self._registry.names)
        if ability not in served.abilities:
            raise errors.wrong_ability(served.name, ability, served.abilities)
        request_context(request.scope).model = served.name
        return served.running or await self._load(request, served, is_stream)

    async def _load(self, request: Request, served: ServedModel, is_stream: bool) -> Running:
        context = request_context(request.scope)
        context.loading = served if is_stream else None
        seconds = min(self._limits.load_seconds, self._limits.timeout_seconds)
        served.num_waiting += 1
        try:
            await unless_disconnected(request.receive, self._registry.load_until(served, seconds))
        finally:
            served.num_waiting -= 1
            context.loading = None
        if served.running is not None:
            return served.running
        raise errors.model_loading(served.name) if served.error is None else errors.model_load_failed(served.name)

    def admit(self, request: Request, model: Running, num_answers: int) -> AdmittedRequest:
        """Before any work is done for a request. A context manager: at its end the request is over, unless `open` was
        called. num_answers: 0 for requests that the engine has nothing to do for.

        Raises APIError 429 when the request is not admitted, 400 for a wrong timeout header.
        """
        context = request_context(request.scope)
        deadline = _deadline(context, request.scope, self._limits.timeout_seconds)
        permit = self._admission.admit(context.client, num_answers, self._capacity(), model.use.end)
        model.use.begin()
        context.headers |= permit.headers
        return AdmittedRequest(context, model, deadline, permit)

    def _capacity(self) -> Capacity:
        """Of all engines of this worker: their requests wait in one queue, and the engines take turns."""
        loaded = [model.running.engine.limits for model in self._registry.models if model.running is not None]
        return Capacity(sum(each.max_sequences for each in loaded), sum(each.kv_tokens for each in loaded))


@dataclass
class AdmittedRequest:
    """A request with a permit, while its prompt is built."""

    _context: RequestContext
    _model: Running
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
        assert isinstance(self._model, RunningModel)
        num_dropped = sum(prompt.num_dropped_rounds for prompt in prompts)
        if num_dropped:
            self._context.headers[DROPPED_ROUNDS_HEADER] = str(num_dropped)
        self._is_open = True  # the stream closes the permit, also where it cannot be started
        return EventStream(self._model, prompts, self._permit, self._context, self._deadline)

    @asynccontextmanager
    async def encoding(self, num_tokens: int) -> AsyncGenerator[int, None]:
        """Limits the time for texts to become vectors or scores; gives the request's priority in the engine.

        Raises APIError 429, and 408 or 504 for the time.
        """
        self._claim(num_tokens)
        self._context.prompt_tokens = num_tokens
        self._permit.started()
        self._is_open = True
        try:
            seconds = None if self._deadline.at == math.inf else self._deadline.at - time.monotonic()
            async with asyncio.timeout(seconds):
                yield self._permit.priority
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
        return Deadline(context.begun + server_seconds, partial(errors.deadline_passed, 504, server_seconds))
    return Deadline(context.begun + seconds, partial(errors.deadline_passed, 408, seconds))
