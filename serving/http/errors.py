"""Failure -> an HTTP response with OpenAI's error object (`message`, `type`, `param`, `code`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from starlette.responses import Response
from typing_extensions import TypedDict

from serving.safe_traceback import where_from

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
RETRY_SECONDS = 5  # while a model loads or an engine restarts


class Error(TypedDict):
    """What went wrong. `param` names the field of the request that is at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    """The one shape of every failure."""

    error: Error


@dataclass(eq=False)
class APIError(Exception):
    """A failure that the client is to see: an HTTP status and the four fields of OpenAI's error object."""

    status: int
    message: str
    type: str = INVALID_REQUEST
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        return f"{self.status} {self.code}: {self.message}"


class ClientLeft(Exception):
    """The client has disconnected, or reads no more of the answer."""


class MessagesError(TypedDict):
    """What went wrong, as Anthropic's clients read it. The message names the field that is at fault."""

    type: str
    message: str


class MessagesErrorResponse(TypedDict):
    """The shape of failures of `/messages`."""

    type: Literal["error"]
    error: MessagesError


MESSAGES_PATHS = frozenset(prefix + path for prefix in ("", "/v1") for path in ("/messages", "/messages/count_tokens"))
MESSAGES_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def messages_envelope(error: APIError) -> str:
    """As `envelope`, in the shape of Anthropic's Messages API."""
    kind = MESSAGES_TYPES.get(error.status, INVALID_REQUEST if error.status < 500 else "api_error")
    where = f"{error.param}: " if error.param and error.param not in error.message else ""
    body: MessagesErrorResponse = {"type": "error", "error": {"type": kind, "message": where + error.message}}
    return json.dumps(body)


def envelope(error: APIError) -> str:
    """The JSON text of an error, for a response body or for an event of a stream that has already started."""
    body: ErrorResponse = {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    }
    return json.dumps(body)


def error_response(error: APIError, path: str) -> Response:
    """The same, as an HTTP response to a request for this path."""
    text = messages_envelope(error) if path in MESSAGES_PATHS else envelope(error)
    return Response(text, error.status, dict(error.headers), "application/json")


def traceback_for_log(error: Exception, failure: APIError) -> str:
    """The exception's type and code locations, without its message, which may quote a prompt.

    Empty unless `failure` is a 500: a 503 is a state of the server, not a fault in the code.
    """
    return "\n" + where_from(error) if failure.status == 500 else ""


def invalid(message: str, param: str | None, code: str = "invalid_value") -> APIError:
    """400: the request is invalid."""
    return APIError(400, message, param=param, code=code)


def unknown_url(method: str, path: str) -> APIError:
    """404: no such endpoint. A base URL that was put in front of a whole path doubles `/v1` or a slash."""
    message = f"Unknown request URL: {method} {path[:200]}. Please check the URL for typos, or see the served /docs."
    once = re.sub(r"^(/v1)+(?=/)", "/v1", re.sub("/+", "/", path[:200]))
    if once != path[:200]:
        message += f" Did you mean '{once}'?"
    return APIError(404, message, code="unknown_url")


def method_not_allowed(method: str, path: str, allowed: str) -> APIError:
    """405: the endpoint exists, but not for this method. `allowed` is the Allow header's value."""
    message = f"Not allowed to {method} on {path[:200]}. (HINT: allowed methods are {allowed}.)"
    return APIError(405, message, code="method_not_supported", headers={"allow": allowed})


def shutting_down() -> APIError:
    """503: this process is shutting down; a retry may reach another one."""
    return APIError(
        503, "The server is shutting down or restarting. Please retry shortly.", SERVER_ERROR, None,
        "server_unavailable", {"retry-after": str(RETRY_SECONDS)},
    )  # fmt: skip


def overloaded() -> APIError:
    """429: this process has as many requests or as many bytes of them as it may hold at once."""
    return APIError(
        429, "The server is processing too many requests. Please try again in 1s.", "rate_limit_error", None,
        "rate_limit_exceeded", {"retry-after": "1"},
    )  # fmt: skip
