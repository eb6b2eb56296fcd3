"""Request body -> a JSON object, read and decoded strictly: bounded in size, time, depth and number length."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn, cast

from starlette.requests import Request

from serving.http.errors import APIError, invalid

MAX_NUMBER_LENGTH = 32  # digits; every valid number of this API has fewer
BODY_SECONDS = 60.0  # for the whole body, so that one sent a byte at a time does not hold a connection
DRAIN_FACTOR = 8  # times the limit that is read and discarded, so that the client can read the error response

# One pass, possessive: strings (even unclosed ones) match as a whole, so brackets inside them do not count.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises APIError: 413 past `max_bytes`, 415 if compressed, 400 if its type is not JSON."""
    _check_headers(request)
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
    return b"".join(chunks)


def _content_length(request: Request) -> int:
    length = request.headers.get("content-length", "0")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0


def _check_headers(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = f"Unsupported content encoding: '{encoding[:40]}'. Send the JSON body uncompressed."
        raise APIError(415, message, code="unsupported_content_encoding")
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type and media_type != "application/json" and not media_type.endswith("+json"):
        raise invalid(
            f"Invalid Content-Type header ({media_type[:60]}), expected application/json. "
            "(HINT: If you're using curl, you can pass -H 'Content-Type: application/json')",
            None,
            "unsupported_content_type",
        )


def parse_object(body: bytes, max_depth: int) -> dict[str, Any]:
    """Decode one JSON object strictly, in time linear in its size. Raises APIError 400 and nothing else.

    Also refuses what Python's decoder accepts: NaN and infinities, repeated keys, lone surrogates, very long numbers.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _broken(f"it is not valid UTF-8 (byte {error.start})") from None
    _check_depth(text, max_depth)
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


def _check_depth(text: str, max_depth: int) -> None:
    if text.count("[") + text.count("{") <= max_depth:
        return
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        match found.group()[0]:
            case "[" | "{":
                depth += 1
                if depth > max_depth:
                    raise _broken(f"it is nested more than {max_depth} levels deep")
            case "]" | "}":
                depth -= 1
            case _:
                pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
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
    """Every string below `value`, keys included, with its path. `_check_depth` has bounded the recursion."""
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
