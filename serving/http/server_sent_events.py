"""Values -> JSON text that survives every client's line splitter -> the text of server-sent events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = "data: [DONE]\n\n"

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def to_json(value: object) -> str:
    """Compact JSON, with the three characters escaped at which httpx and requests would split an event."""
    text = _encode(value)
    if "\u2028" in text or "\u2029" in text or "\x85" in text:
        text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")
    return text


def to_json_slices(value: object, depth: int = 5) -> Iterator[str]:
    """The same text as `to_json`, in parts: encoding one part holds the interpreter for milliseconds only."""
    if depth and isinstance(value, dict) and _has_containers(value.values()):
        opening = "{"
        for key, item in value.items():
            yield f"{opening}{to_json(key)}:"
            yield from to_json_slices(item, depth - 1)
            opening = ","
        yield "}"
    elif depth and isinstance(value, list) and _has_containers(value[:1]):
        opening = "["
        for item in value:
            yield opening
            yield from to_json_slices(item, depth - 1)
            opening = ","
        yield "]"
    else:
        yield to_json(value)


def _has_containers(values: Iterable[object]) -> bool:
    return any(isinstance(value, dict | list) for value in values)


def event(data: str, name: str | None = None) -> str:
    """One event. Never with `id:` or `retry:` lines: the openai SDK takes those for events without data."""
    return f"data: {data}\n\n" if name is None else f"event: {name}\ndata: {data}\n\n"


def comment(text: str) -> str:
    """What clients skip; it keeps the connection open."""
    return f": {text}\n\n"


def around_empty_text(event: str) -> tuple[str, str]:
    """What stands before and after the last "" of an event: with any other JSON text between, it is a new event."""
    before, _, after = event.rpartition('""')
    return before, after
