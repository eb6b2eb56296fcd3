"""Events' JSON text -> bytes of a server-sent event stream; JSON that no client's line splitter breaks."""

from __future__ import annotations

import json

HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def to_json(value: object) -> str:
    """Compact JSON, with the three characters escaped at which httpx and requests would split an event."""
    text = _encode(value)
    if "\u2028" in text or "\u2029" in text or "\x85" in text:
        text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")
    return text


def event(data: str) -> bytes:
    """One event. Never with `id:` or `retry:` lines: the openai SDK takes those for events without data."""
    return f"data: {data}\n\n".encode()


def events(data: list[str]) -> bytes:
    """Several events as one message, so that they cost one send."""
    return "".join([f"data: {item}\n\n" for item in data]).encode()


def named_events(data: list[str]) -> bytes:
    """The same for events whose JSON begins with their type, which stands in a line of its own, too."""
    begin = len('{"type":"')
    names = [item[begin : item.index('"', begin)] for item in data]
    return "".join([f"event: {name}\ndata: {item}\n\n" for name, item in zip(names, data, strict=True)]).encode()
