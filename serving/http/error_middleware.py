"""The outermost layer: a request id and a time on every reply, and no exception past this point. Knows no endpoint."""

from __future__ import annotations

import logging
import time

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http.disconnect import ClientLeft
from serving.http.errors import error_response
from serving.http.request_context import request_context
from serving.openai.errors import from_exception, trace

CLIENT_LEFT = 499  # the status that access logs know for it; nobody reads it

logger = logging.getLogger(__name__)


class ErrorMiddleware:
    """ASGI middleware around the whole API."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        record = request_context(scope)
        request_id = record.request_id
        has_started = False

        async def send_labelled(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in record.headers.items():
                    headers[name] = value
                headers["openai-processing-ms"] = str(round((time.perf_counter() - begun) * 1000))
            await send(message)

        try:
            await self._app(scope, receive, send_labelled)
        except (ClientLeft, ClientDisconnect):
            record.is_aborted = True
            logger.info("request %s: the client left before the answer began", request_id)
            if not has_started:
                await Response(status_code=CLIENT_LEFT)(scope, receive, send_labelled)
        except Exception as error:
            failure = from_exception(error)
            record.error_code = failure.code
            if failure.status >= 500:
                logger.error("request %s failed with %s%s", request_id, failure, trace(error, failure))
            if has_started:
                raise
            await error_response(failure)(scope, receive, send_labelled)
