"""An event stream -> one response: all its events for a whole answer, or server-sent events as they come."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serving.generation.event_stream import EventStream
from serving.generation.interface import ChatEvent, IndexedEvent
from serving.http import server_sent_events as sse
from serving.http.errors import MESSAGES_PATHS, APIError, ClientLeft, messages_envelope, traceback_for_log
from serving.http.errors import envelope as error_json
from serving.http.request_context import LoadingModel, RequestContext, request_context
from serving.openai.errors import from_exception
from serving.openai.limits import ApiLimits
from serving.registry import ModelRegistry

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Chunks(Protocol):
    """The events of an answer -> the text of server-sent events."""

    def push(self, index: int, event: ChatEvent) -> list[str]: ...

    def end(self) -> list[str]: ...

    def fail(self, failure: APIError) -> list[str]: ...


async def collect(stream: EventStream, request: Request) -> list[IndexedEvent]:
    """Every event of the answer. Closes the stream. Raises ClientLeft as soon as the client has disconnected."""
    try:
        return await unless_disconnected(request.receive, stream.take_all())
    finally:
        stream.close()


async def begin_stream(stream: EventStream, chunks: Chunks, request: Request, limits: ApiLimits) -> Response:
    """The response, once its first events are there or `progress_seconds` are over: a failure before that is an HTTP
    error and not an event, and proxies see a byte within seconds of however long a prompt."""
    try:
        first = await unless_disconnected(request.receive, stream.take(limits.progress_seconds))
    except BaseException:
        stream.close()
        raise
    return EventStreamResponse(stream, first, chunks, limits)


class EventStreamResponse(Response):
    """Sends events until the stream ends or fails or the client leaves; then closes the stream."""

    def __init__(
        self, stream: EventStream, first: list[IndexedEvent] | None, chunks: Chunks, limits: ApiLimits
    ) -> None:
        super().__init__(headers=sse.HEADERS)
        del self.headers["content-length"]
        self._stream, self._first, self._chunks, self._limits = stream, first, chunks, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = request_context(scope)
        context.is_stream = True
        timed_send = WriteTimeout(send, self._limits.stall_seconds)
        try:
            await unless_disconnected(receive, self._send(timed_send, context), timed_send)
        except (ClientLeft, OSError):
            context.is_aborted = True
            logger.info("request %s: the client left in the middle of the answer", context.request_id)
        finally:
            self._stream.close()

    def close(self) -> None:
        """Give up the answer, for a response that is not sent."""
        self._stream.close()

    async def _send(self, send: Send, context: RequestContext) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        events, has_begun = self._first, False
        try:
            while events is not None:
                has_begun = has_begun or bool(events)
                data = [chunk for index, event in events for chunk in self._chunks.push(index, event)]
                if not events:
                    data = [sse.comment("ping" if has_begun else self._progress())]
                if data:  # events may have no chunks
                    await send({"type": "http.response.body", "body": "".join(data).encode(), "more_body": True})
                seconds = self._limits.ping_seconds if has_begun else self._limits.progress_seconds
                events = await self._stream.take(seconds)
            last = self._chunks.end()
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001
            # the status line is gone: the failure has to travel in the stream, which then ends without [DONE]
            failure = from_exception(error)
            context.error_code = failure.code
            where = traceback_for_log(error, failure)
            logger.error("request %s failed in its stream with %s%s", context.request_id, failure, where)
            last = self._chunks.fail(failure)
        await send({"type": "http.response.body", "body": "".join(last).encode(), "more_body": False})

    def _progress(self) -> str:
        progress = self._stream.prompt_progress()
        return "ping" if progress is None else f"prefill {progress[0]:,}/{progress[1]:,}"


class Served(Protocol):
    """What of `common.Api` this file needs."""

    @property
    def registry(self) -> ModelRegistry: ...

    @property
    def limits(self) -> ApiLimits: ...


S = TypeVar("S", bound=Served)


async def answer(handler: Callable[[S, Request], Coroutine[Any, Any, Response]], api: S, request: Request) -> Response:
    """The response that a handler makes. If it waits for a model and its client for a stream, the stream begins with
    comments that say how far the model is."""
    if api.registry.all_loaded:
        return await handler(api, request)
    limits = api.limits
    working = asyncio.create_task(handler(api, request))
    try:
        await asyncio.wait({working}, timeout=limits.progress_seconds)
        loading = request_context(request.scope).loading
        if working.done() or loading is None:
            return await working
        return LoadingStream(working, loading, limits)
    except asyncio.CancelledError:
        working.cancel()
        raise


class LoadingStream(Response):
    """Comments while a model loads, then the stream of the answer or an event with the error."""

    def __init__(self, working: asyncio.Task[Response], model: LoadingModel, limits: ApiLimits) -> None:
        super().__init__(headers=sse.HEADERS)
        del self.headers["content-length"]
        self._working, self._model, self._limits = working, model, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = request_context(scope)
        context.is_stream = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def send_body(message: Message) -> None:
            if message["type"] != "http.response.start":
                await send(message)

        is_taken = False
        try:
            while not self._working.done():
                text = sse.comment(f"loading {self._model.progress:.0%}")
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
                await asyncio.wait({self._working}, timeout=self._limits.progress_seconds)
            response = self._working.result()
            is_taken = True
        except (ClientLeft, OSError):
            context.is_aborted = True
        except Exception as error:  # noqa: BLE001
            failure = from_exception(error)
            context.error_code = failure.code
            logger.error("request %s failed in its stream with %s", context.request_id, failure)
            is_messages = scope["path"] in MESSAGES_PATHS
            text = sse.event(messages_envelope(failure), "error") if is_messages else sse.event(error_json(failure))
            await send({"type": "http.response.body", "body": text.encode(), "more_body": False})
        else:
            await response(scope, receive, send_body)
        finally:
            if not is_taken:
                self._working.cancel()
                self._working.add_done_callback(_close_unsent)


def _close_unsent(working: asyncio.Task[Response]) -> None:
    response = None if working.cancelled() or working.exception() else working.result()
    if isinstance(response, EventStreamResponse):
        response.close()


class WriteTimeout:
    """An ASGI `send` that measures how long its present message has been waiting for the client."""

    def __init__(self, send: Send, max_seconds: float) -> None:
        self._send = send
        self._max_seconds = max_seconds
        self._since: float | None = None

    async def __call__(self, message: Message) -> None:
        self._since = time.monotonic()
        await self._send(message)
        self._since = None

    async def expired(self) -> None:
        """Returns when one message has waited too long. Polls: a timer for each message costs more than the message."""
        while self._since is None or time.monotonic() - self._since < self._max_seconds:
            await asyncio.sleep(self._max_seconds / 4)


async def unless_disconnected(
    receive: Receive, work: Coroutine[Any, Any, T], write_timeout: WriteTimeout | None = None
) -> T:
    """The result of `work`, which is cancelled when the client leaves or stops reading. Raises ClientLeft then.

    `receive` must have delivered the whole request body before.
    """
    working = asyncio.create_task(work)
    watching = [asyncio.create_task(_disconnected(receive))]
    if write_timeout is not None:
        watching.append(asyncio.create_task(write_timeout.expired()))
    try:
        await asyncio.wait((working, *watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        for task in (working, *watching):
            task.cancel()
        await asyncio.gather(working, *watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
