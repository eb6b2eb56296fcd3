"""What is known of one HTTP request while it is served: for the log, the metrics and the trace. Knows no prompt."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

SANE_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
KEY = "record"  # in the scope's state


@dataclass
class RequestContext:
    """Filled in by whoever learns something. Holds counts, names and times; never text of a client and never a key."""

    request_id: str
    method: str
    path: str
    begun: float  # time.monotonic()
    client: str  # who is counted: the name of a key, else the peer's address
    key_name: str | None = None
    status: int = 0  # 0: no answer was begun
    error_code: str | None = None
    is_stream: bool = False
    is_aborted: bool = False  # the client left before the end
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_at: float | None = None
    finish_reasons: list[str] = field(default_factory=list[str])
    traceparent: str | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])  # for the response


def request_context(scope: Scope) -> RequestContext:
    """The record of this request, made when it is asked for the first time."""
    state: dict[str, Any] = scope.setdefault("state", {})
    record = state.get(KEY)
    if record is None:
        peer = scope.get("client")
        record = state[KEY] = RequestContext(
            request_id=_request_id(scope),
            method=scope["method"],
            path=scope["path"],
            begun=time.monotonic(),
            client=peer[0] if peer else "",
            traceparent=header(scope, b"traceparent"),
        )
    return record


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of this name; name in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None


def _request_id(scope: Scope) -> str:
    """The client's own id if it is harmless in logs and headers, else a fresh one."""
    given = header(scope, b"x-request-id")
    return given if given and SANE_REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
