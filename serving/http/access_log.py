"""Finished request -> one log line of counts, names and times; never a client's text, a key or a query string."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any, Literal

from serving.http.request_context import RequestContext

MAX_PATH = 200

Style = Literal["text", "json"]


class AccessLog:
    """Writes `key=value` pairs or JSON lines."""

    def __init__(self, style: Style, logger: logging.Logger) -> None:
        self._style = style
        self._logger = logger
        if style == "json":
            # lines that a collector parses must not carry another logger's prefix
            handler = logging.StreamHandler(sys.stdout)
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.handlers = [handler]
            logger.propagate = False
        logger.setLevel(logging.INFO)

    def __call__(self, context: RequestContext, seconds: float) -> None:
        fields = to_fields(context, seconds)
        if self._style == "json":
            self._logger.info("%s", json.dumps(fields))
        else:
            self._logger.info("%s", " ".join(f"{name}={_quoted(value)}" for name, value in fields.items()))


def to_fields(context: RequestContext, seconds: float) -> dict[str, Any]:
    """The fields of one line; those without a value are left out."""
    ttft = None if context.first_token_at is None else round((context.first_token_at - context.begun) * 1000, 1)
    fields = {
        "request_id": context.request_id,
        "method": context.method,
        "path": context.path[:MAX_PATH],
        "status": context.status or None,
        "client": context.key_name or context.client,
        "model": context.model,
        "stream": context.is_stream or None,
        "prompt_tokens": context.prompt_tokens or None,
        "cached_tokens": context.cached_tokens or None,
        "completion_tokens": context.completion_tokens or None,
        "ttft_ms": ttft,
        "duration_ms": round(seconds * 1000, 1),
        "finish_reason": ",".join(dict.fromkeys(context.finish_reasons)) or None,
        "error": context.error_code,
        "aborted": context.is_aborted or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _quoted(value: Any) -> str:
    """As it is if that is one plain word, else as JSON."""
    text = value if isinstance(value, str) else json.dumps(value)
    is_plain = text.isascii() and text.isprintable() and not any(c in text for c in ' "=')
    return text if is_plain and text else json.dumps(text)
