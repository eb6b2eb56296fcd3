"""One answer as a server-sent event stream, sent as it comes. Knows neither chat nor tokens: chunks are text here."""

from __future__ import annotations

import logging
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.generation.event_stream import EventStream
from serving.generation.interface import ChatEvent
from serving.http import server_sent_events as sse
from serving.http.disconnect import ClientLeft, WriteTimeout, unless_disconnected
from serving.http.errors import APIError, traceback_for_log
from serving.http.request_context import RequestContext, request_context
from serving.openai.common import IndexedEvent
from serving.openai.errors import from_exception
from serving.openai.limits import ApiLimits

logger = logging.getLogger(__name__)


class Chunks(Protocol):
    """Folds the events of an answer into the text of server-sent events."""

    def push(self, index: int, event: ChatEvent) -> list[str]: ...

    def end(self) -> list[str]: ...

    def fail(self, failure: APIError) -> list[str]: ...


async def collect(feed: EventStream, request: Request) -> list[IndexedEvent]:
    """Every event of the answer. Closes the feed; raises ClientLeft as soon as nobody waits for the answer."""
    try:
        return await unless_disconnected(request.receive, feed.take_all())
    finally:
        await feed.close()


async def begin_stream(feed: EventStream, chunks: Chunks, request: Request, limits: ApiLimits) -> Response:
    """The response, once its first event is there: what fails before is an HTTP error and not an event."""
    try:
        first = await unless_disconnected(request.receive, feed.take())
    except BaseException:
        await feed.close()
        raise
    return EventStreamResponse(feed, first, chunks, limits)


class EventStreamResponse(Response):
    """Sends the events of a feed until it ends, fails, or the client leaves; then closes the feed."""

    def __init__(self, feed: EventStream, first: list[IndexedEvent] | None, chunks: Chunks, limits: ApiLimits) -> None:
        super().__init__(headers=sse.HEADERS)
        del self.headers["content-length"]
        self._feed = feed
        self._first = first
        self._chunks = chunks
        self._ping_seconds = limits.ping_seconds
        self._stall_seconds = limits.stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = request_context(scope)
        record.is_stream = True
        patience = WriteTimeout(send, self._stall_seconds)
        try:
            await unless_disconnected(receive, self._send(patience, record), patience)
        except (ClientLeft, OSError):
            record.is_aborted = True
            logger.info("request %s: the client left in the middle of the answer", record.request_id)
        finally:
            await self._feed.close()

    async def _send(self, send: Send, record: RequestContext) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        events = self._first
        try:
            while events is not None:
                data = [chunk for index, event in events for chunk in self._chunks.push(index, event)]
                if data:
                    await _send_part(send, "".join(data).encode())
                elif not events:
                    await _send_part(send, sse.PING)
                events = await self._feed.take(self._ping_seconds)
            last = self._chunks.end()
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001
            # the status line is gone: the failure has to travel in the stream, which then ends without [DONE]
            failure = from_exception(error)
            record.error_code = failure.code
            logger.error(
                "request %s failed in its stream with %s%s",
                record.request_id,
                failure,
                traceback_for_log(error, failure),
            )
            last = self._chunks.fail(failure)
        await send({"type": "http.response.body", "body": "".join(last).encode(), "more_body": False})


async def _send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
