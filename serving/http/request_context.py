"""ASGI scope -> RequestContext: id, client, counts and times of one request, for headers, log, metrics and trace."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Scope, Send

SAFE_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
KEY = "request_context"  # in the scope's state
IGNORED_HEADER = "x-chatglm-ignored-fields"
UNSAFE_IN_HEADER = re.compile(r"[^\x21-\x2b\x2d-\x7e]")  # a comma separates
MAX_LOGGED = 1000

logger = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()  # (client, field) pairs that are in the log


class LoadingModel(Protocol):
    """A model on its way into memory."""

    @property
    def progress(self) -> float:
        """0 to 1."""
        ...


@dataclass
class RequestContext:
    """Each stage fills in what it learns. Counts, names and times only: no text of a client, no API key."""

    request_id: str
    method: str
    path: str
    begun: float  # time.monotonic()
    client: str  # what rate limits count by: the name of the API key, else the peer's address
    key_name: str | None = None
    is_administrator: bool = False  # by the API key's role
    model: str | None = None  # the true name of the one that was asked
    status: int = 0  # 0: no response has started
    error_code: str | None = None
    is_stream: bool = False
    is_aborted: bool = False  # the client disconnected before the end
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_at: float | None = None
    finish_reasons: list[str] = field(default_factory=list[str])
    traceparent: str | None = None
    loading: LoadingModel | None = None  # what a request for a stream waits for
    headers: dict[str, str] = field(default_factory=dict[str, str])  # for the response
    has_processing_time: bool = False  # the response gets `openai-processing-ms`
    is_labelled: bool = False  # a middleware has wrapped `send` already


def request_context(scope: Scope) -> RequestContext:
    """The context of this request; the first call creates it."""
    state: dict[str, Any] = scope.setdefault("state", {})
    context = state.get(KEY)
    if context is None:
        peer = scope.get("client")
        context = state[KEY] = RequestContext(
            request_id=_request_id(scope),
            method=scope["method"],
            path=scope["path"],
            begun=time.monotonic(),
            client=peer[0] if peer else "",
            traceparent=header(scope, b"traceparent"),
        )
    return context


def label_response(context: RequestContext, send: Send) -> Send:
    """A `send` that notes the status and adds this request's headers to the response.

    Only the outermost middleware that calls this wraps `send`; for those inside it is returned as it is.
    """
    if context.is_labelled:
        return send
    context.is_labelled = True

    async def send_labelled(message: Message) -> None:
        if message["type"] == "http.response.start":
            context.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = context.request_id
            for name, value in context.headers.items():
                headers[name] = value
            if context.has_processing_time:
                headers["openai-processing-ms"] = str(round((time.monotonic() - context.begun) * 1000))
        await send(message)

    return send_labelled


def note_ignored(context: RequestContext, fields: list[str]) -> None:
    """Name these fields of the body in the response's header, and in the log once for each client and field."""
    safe = [UNSAFE_IN_HEADER.sub("?", name) for name in fields]
    context.headers[IGNORED_HEADER] = ", ".join(safe)[:2000]
    for name in safe:
        if (context.client, name) not in _logged and len(_logged) < MAX_LOGGED:
            _logged.add((context.client, name))
            logger.warning("request %s: the unknown field %s is ignored", context.request_id, name)


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of this name; name in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None


def _request_id(scope: Scope) -> str:
    """The client's own id if it is safe in logs and headers, else a new one."""
    given = header(scope, b"x-request-id")
    return given if given and SAFE_REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
