"""Request body -> its bytes under limits of size, time and shape, before any framework reads it -> a JSON object."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http.errors import APIError, error_response, invalid, overloaded
from serving.http.request_context import header, request_context

MAX_KEYS = 10_000  # of one object
MAX_NUMBER_LENGTH = 32  # digits; every valid number of this API has fewer
BODY_SECONDS = 60.0  # for the whole body, so that one sent a byte at a time does not hold a connection
DRAIN_FACTOR = 8  # times the limit that is read and discarded, so that the client can read the error response
BUFFER_FACTOR = 128  # times the limit that the bodies of all unanswered requests may have together
INLINE_BYTES = 256 * 1024  # larger bodies are checked and parsed in a thread: the event loop has streams to feed
KEY = "request_body"  # in the scope's state

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class BodyLimits:
    """What a request body may be.

    A conversation of 8,000 messages with tool calls has 32,000 objects and arrays; a prompt of 250,000 token ids has as
    many values. Parsing and validating the largest body within these limits takes about half a second of one core.
    """

    max_bytes: int = 4 * 2**20
    max_depth: int = 64
    max_containers: int = 50_000  # objects and arrays
    max_values: int = 500_000


class BufferedBody:
    """A body that has been read: given once, to a handler as bytes or to another framework as an ASGI message."""

    def __init__(self, data: bytes, receive: Receive) -> None:
        self._data: bytes | None = data
        self._receive = receive

    def take(self) -> bytes:
        """The bytes, which are not kept here any longer."""
        data, self._data = self._data, None
        return data or b""

    async def receive(self) -> Message:
        """An ASGI `receive`: the body first, then what the client does afterwards."""
        if self._data is None:
            return await self._receive()
        return {"type": "http.request", "body": self.take(), "more_body": False}


class BodyMiddleware:
    """Reads each request's body under the limits before the application begins. For one event loop.

    Outside of every route, BentoML's included, and inside of AccessMiddleware, so that only accepted clients send.
    """

    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        self._app = app
        self._limits = limits
        self._num_buffered = 0  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        context = request_context(scope)
        size = 0
        try:
            if self._num_buffered >= self._limits.max_bytes * BUFFER_FACTOR:
                raise overloaded()
            data = await _read(Request(scope, receive), self._limits)
            size = len(data)
            self._num_buffered += size
            body = scope["state"][KEY] = BufferedBody(data, receive)
            del data
            await self._app(scope, body.receive, send)
        except ClientDisconnect:
            context.is_aborted = True
        except APIError as refusal:
            context.error_code = refusal.code
            await error_response(refusal, scope["path"])(scope, receive, send)
        finally:
            self._num_buffered -= size


async def read_body(request: Request, limits: BodyLimits) -> bytes:
    """The whole body, whose shape has been checked; once. Raises APIError 400, 408, 413, 415; ClientDisconnect."""
    buffered: BufferedBody | None = request.scope.get("state", {}).get(KEY)
    return await _read(request, limits) if buffered is None else buffered.take()


async def _read(request: Request, limits: BodyLimits) -> bytes:
    _check_headers(request)
    max_bytes = limits.max_bytes
    too_large = APIError(413, f"The request body is larger than {max_bytes} bytes.", code="request_too_large")
    if request.headers.get("expect", "").lower() == "100-continue" and _content_length(request) > max_bytes:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= max_bytes:
                    chunks.append(chunk)
                else:
                    chunks.clear()
                if size > max_bytes * DRAIN_FACTOR:
                    break
    except TimeoutError:
        message = f"The request body did not arrive within {BODY_SECONDS:g} seconds."
        raise APIError(408, message, code="request_timeout") from None
    if size > max_bytes:
        raise too_large
    body = b"".join(chunks)
    if size > INLINE_BYTES:
        await asyncio.to_thread(check_shape, body, limits)
    else:
        check_shape(body, limits)
    return body


def _has_body(scope: Scope) -> bool:
    return header(scope, b"transfer-encoding") is not None or header(scope, b"content-length") not in (None, "0")


def _content_length(request: Request) -> int:
    length = request.headers.get("content-length", "0")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0


def _check_headers(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = f"Unsupported content encoding: '{encoding[:40]}'. Send the JSON body uncompressed."
        raise APIError(415, message, code="unsupported_content_encoding")
    # some clients and proxies send the header twice, which is one value with a comma
    for given in request.headers.get("content-type", "").split(","):
        media_type = given.split(";")[0].strip().lower()
        if media_type and media_type != "application/json" and not media_type.endswith("+json"):
            raise invalid(
                f"Invalid Content-Type header ({media_type[:60]}), expected application/json. "
                "(HINT: If you're using curl, you can pass -H 'Content-Type: application/json')",
                None,
                "unsupported_content_type",
            )


def check_shape(body: bytes, limits: BodyLimits) -> None:
    """Raises APIError 400 for JSON text with too many values or too deep a nesting, in time linear in its size.

    Whether the text is JSON at all is for the parser to find out: this one bounds what the parser may have to do.
    """
    if body.count(b"{") + body.count(b"[") <= limits.max_depth and body.count(b",") < limits.max_values:
        return
    # escapes occur in strings only, and a run of backslashes is pairs from its left: what is left are strings' ends
    text = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    if text.count(b'"') > 4 * limits.max_values:  # a key and a value have four quotation marks
        raise _broken(f"it has more than {limits.max_values:,} values")
    outside = b"".join(text.split(b'"')[::2])
    num_containers = outside.count(b"{") + outside.count(b"[")
    if num_containers > limits.max_containers:
        raise _broken(f"it has more than {limits.max_containers:,} objects and arrays")
    if outside.count(b",") + num_containers > limits.max_values:
        raise _broken(f"it has more than {limits.max_values:,} values")
    depth = 0
    for bracket in outside.translate(None, _NOT_BRACKETS):
        if bracket in b"[{":
            depth += 1
            if depth > limits.max_depth:
                raise _broken(f"it is nested more than {limits.max_depth} levels deep")
        else:
            depth -= 1
            if depth < 0:
                raise _broken("a bracket is closed that was not opened")


def parse_object(body: bytes) -> dict[str, Any]:
    """Decode one JSON object that `check_shape` has passed, strictly. Raises APIError 400 and nothing else.

    Also refuses what Python's decoder accepts: NaN and infinities, repeated keys, lone surrogates, very long numbers.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _broken(f"it is not valid UTF-8 (byte {error.start})") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int,
        )
    except json.JSONDecodeError as error:
        raise _broken(f"{error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise _broken("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise _broken("it must be a JSON object")
    tree = cast(dict[str, Any], value)
    if _SURROGATE_ESCAPE.search(text):
        _check_surrogates(tree)
    return tree


def _broken(reason: str, param: str | None = None) -> APIError:
    return invalid(f"We could not parse the JSON body of your request: {reason}.", param, "invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:  # each key that is no field is an error of its own to pydantic
        raise _broken(f"an object has more than {MAX_KEYS:,} keys")
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                shown = key[:100].encode("utf-8", "replace").decode()
                raise _broken(f"the key '{shown}' occurs twice in one object", shown)
            seen.add(key)
    return found


def _constant(name: str) -> NoReturn:
    raise _broken(f"{name} is not a JSON number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _broken("a number is out of range")
    return value


def _int(digits: str) -> int:
    if len(digits) > MAX_NUMBER_LENGTH:
        raise _broken("a number is out of range")
    return int(digits)


def _check_surrogates(tree: dict[str, Any]) -> None:
    for path, text in _strings(tree, ""):
        try:
            text.encode()
        except UnicodeEncodeError:
            shown = path.encode("utf-8", "replace").decode()
            raise _broken(f"'{shown}' holds half of a surrogate pair, which is not a character", shown) from None


def _strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every string below `value`, keys included, with its path. `check_shape` has bounded the recursion."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in cast(dict[str, Any], value).items():
            below = f"{path}.{key}" if path else key
            yield below, key
            yield from _strings(item, below)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{path}[{index}]")
