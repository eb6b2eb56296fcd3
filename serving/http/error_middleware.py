"""ASGI middleware around the API: an exception becomes an error response; a client that disconnected becomes a 499."""

from __future__ import annotations

import logging
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.http.errors import APIError, ClientLeft, error_response, traceback_for_log
from serving.http.request_context import label_response, request_context

CLIENT_LEFT = 499  # access logs' usual status for it; the client does not receive it

logger = logging.getLogger(__name__)


class ErrorMiddleware:
    """No exception passes it before the response has started. Works alone or inside AccessMiddleware."""

    def __init__(self, app: ASGIApp, to_api_error: Callable[[Exception], APIError]) -> None:
        self._app = app
        self._to_api_error = to_api_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = request_context(scope)
        context.has_processing_time = True
        send = label_response(context, send)
        try:
            await self._app(scope, receive, send)
        except (ClientLeft, ClientDisconnect):
            context.is_aborted = True
            logger.info("request %s: the client disconnected before the response started", context.request_id)
            if not context.status:
                await Response(status_code=CLIENT_LEFT)(scope, receive, send)
        except Exception as error:
            failure = self._to_api_error(error)
            context.error_code = failure.code
            if failure.status >= 500:
                logger.error(
                    "request %s failed with %s%s", context.request_id, failure, traceback_for_log(error, failure)
                )
            if context.status:
                raise
            await error_response(failure, scope["path"])(scope, receive, send)
