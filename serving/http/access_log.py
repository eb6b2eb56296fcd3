"""One line for each request: counts, names and times. Never text of a client, never a key, never a query string."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any, Literal

from serving.http.request_context import RequestContext

MAX_PATH = 200

Style = Literal["text", "json", "off"]


class AccessLog:
    """Writes records as `key=value` pairs or as JSON lines."""

    def __init__(self, style: Style, logger: logging.Logger) -> None:
        self._style = style
        self._logger = logger
        if style == "json":
            # lines that a collector parses must not carry another logger's prefix
            handler = logging.StreamHandler(sys.stdout)
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.handlers = [handler]
            logger.propagate = False
        if style != "off":
            logger.setLevel(logging.INFO)

    def __call__(self, record: RequestContext, seconds: float) -> None:
        if self._style == "off":
            return
        fields = to_fields(record, seconds)
        if self._style == "json":
            self._logger.info("%s", json.dumps(fields))
        else:
            self._logger.info("%s", " ".join(f"{name}={_word(value)}" for name, value in fields.items()))


def to_fields(record: RequestContext, seconds: float) -> dict[str, Any]:
    """What is said of a request; nothing is said of what it did not have."""
    ttft = None if record.first_token_at is None else round((record.first_token_at - record.begun) * 1000, 1)
    fields = {
        "request_id": record.request_id,
        "method": record.method,
        "path": record.path[:MAX_PATH],
        "status": record.status or None,
        "client": record.key_name or record.client,
        "stream": record.is_stream or None,
        "prompt_tokens": record.prompt_tokens or None,
        "cached_tokens": record.cached_tokens or None,
        "completion_tokens": record.completion_tokens or None,
        "ttft_ms": ttft,
        "duration_ms": round(seconds * 1000, 1),
        "finish_reason": ",".join(dict.fromkeys(record.finish_reasons)) or None,
        "error": record.error_code,
        "aborted": record.is_aborted or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    is_plain = text.isascii() and text.isprintable() and not any(c in text for c in ' "=')
    return text if is_plain and text else json.dumps(text)
