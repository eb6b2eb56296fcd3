"""What may be said of an exception in a log, and what kind it is. A leaf."""

from __future__ import annotations

import traceback

import torch


def where_from(error: BaseException) -> str:
    """An exception's type and the places it came through, without its message, which may quote a client's text."""
    return f"{type(error).__qualname__}\n" + "".join(traceback.format_tb(error.__traceback__)).rstrip()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that the device or the host has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
