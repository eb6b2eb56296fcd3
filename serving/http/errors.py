"""Failure -> an HTTP response with OpenAI's error object (`message`, `type`, `param`, `code`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.responses import Response
from typing_extensions import TypedDict

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
    """One failure, on its way to the client: a status and the four keys of OpenAI's envelope."""

    status: int
    message: str
    type: str = INVALID_REQUEST
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        return f"{self.status} {self.code}: {self.message}"


def envelope(error: APIError) -> str:
    """The JSON text of an error, for a response body or for an event of a stream that has already begun."""
    body: ErrorResponse = {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    }
    return json.dumps(body)


def error_response(error: APIError) -> Response:
    """The same, as an HTTP response."""
    return Response(envelope(error), error.status, dict(error.headers), "application/json")


def invalid(message: str, param: str | None, code: str = "invalid_value") -> APIError:
    """400: the client's fault."""
    return APIError(400, message, param=param, code=code)


def unknown_url(method: str, path: str) -> APIError:
    """404: no such endpoint."""
    message = f"Unknown request URL: {method} {path[:200]}. Please check the URL for typos, or see the served /docs."
    return APIError(404, message, code="unknown_url")


def method_not_allowed(method: str, path: str, allowed: str) -> APIError:
    """405: the endpoint exists, but not for this method. `allowed` is the Allow header's value."""
    message = f"Not allowed to {method} on {path[:200]}. (HINT: allowed methods are {allowed}.)"
    return APIError(405, message, code="method_not_supported", headers={"allow": allowed})


def shutting_down() -> APIError:
    """503: this process is about to end; another one may answer."""
    return APIError(
        503, "The server is shutting down or restarting. Please retry shortly.", SERVER_ERROR, None,
        "server_unavailable", {"retry-after": str(RETRY_SECONDS)},
    )  # fmt: skip
