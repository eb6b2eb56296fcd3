"""The outermost layer: a request id and a time on every reply, and no exception past this point. Knows no endpoint."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.disconnect import ClientLeft
from serving.api.errors import error_response, from_exception

SANE_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
CLIENT_LEFT = 499  # the status that access logs know for it; nobody reads it

logger = logging.getLogger(__name__)


class Edge:
    """ASGI middleware around the whole API."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        has_started = False

        async def send_labelled(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round((time.perf_counter() - begun) * 1000))
            await send(message)

        try:
            await self._app(scope, receive, send_labelled)
        except (ClientLeft, ClientDisconnect):
            logger.info("request %s: the client left before the answer began", request_id)
            if not has_started:
                await Response(status_code=CLIENT_LEFT)(scope, receive, send_labelled)
        except Exception as error:
            failure = from_exception(error)
            if failure.status >= 500:
                # a 503 is a state of the server; only a 500 has a place in the code worth a traceback
                traceback_of = error if failure.status == 500 else None
                logger.error("request %s failed with %s", request_id, failure, exc_info=traceback_of)
            if has_started:
                raise
            await error_response(failure)(scope, receive, send_labelled)


def _request_id(scope: Scope) -> str:
    """The client's own id if it is harmless in logs and headers, else a fresh one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            if SANE_REQUEST_ID.fullmatch(given):
                return given
    return f"req_{uuid.uuid4().hex}"
