"""The number formats of served weights, and what a conversion to them reports: progress, or that it is unsupported."""

from __future__ import annotations

from typing import Literal, Protocol

Precision = Literal["float32", "bfloat16", "float16", "int8", "int4"]  # of the weights while they are served
QuantizedPrecision = Literal["int8", "int4"]


class Progress(Protocol):
    """Called while a model is imported or loaded; `what` names the current step."""

    def __call__(self, done_bytes: int, total_bytes: int, what: str) -> None: ...


class UnsupportedPrecision(ValueError):
    """The device has no kernel for this precision; the message is one line for the operator."""
