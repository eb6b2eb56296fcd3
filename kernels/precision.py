"""The number formats that weights are served in, and what packing them reports."""

from __future__ import annotations

from typing import Literal, Protocol

Precision = Literal["float32", "bfloat16", "float16", "int8", "int4"]  # of the weights while they are served


class Progress(Protocol):
    """Told how far an import or a load is."""

    def __call__(self, done_bytes: int, total_bytes: int, what: str) -> None: ...


class UnsupportedPrecision(ValueError):
    """The device has no kernel for this precision; the message is one line for a person."""
