"""Bytes done and bytes in total -> a progress bar on a terminal, or a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

BAR_WIDTH = 24
REDRAW_SECONDS = 0.1
LINE_SECONDS = 5.0


def no_progress(done_bytes: int, total_bytes: int, what: str) -> None:
    """A Progress that prints nothing."""


class ProgressPrinter:
    """Prints bytes, rate and time left. `close` ends the line."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._clock = clock
        self._begun = clock()
        self._printed: float | None = None
        self._width = 0

    def __call__(self, done_bytes: int, total_bytes: int, what: str) -> None:
        now = self._clock()
        interval = REDRAW_SECONDS if self._is_terminal else LINE_SECONDS
        is_last = done_bytes >= total_bytes
        if self._printed is not None and now - self._printed < interval and not is_last:
            return
        self._printed = now
        self._print(describe(done_bytes, total_bytes, now - self._begun, what, with_bar=self._is_terminal))

    def close(self) -> None:
        if self._is_terminal and self._width:
            self._stream.write("\n")
            self._stream.flush()
        self._width = 0

    def _print(self, line: str) -> None:
        if self._is_terminal:
            # padded, to overwrite a longer line before it
            self._stream.write(f"\r{line.ljust(self._width)}")
            self._width = len(line)
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()


def describe(done_bytes: int, total_bytes: int, seconds: float, what: str, *, with_bar: bool) -> str:
    """One line of progress, e.g. `[####....]  42 %  5.2 of 12.5 GB  310 MB/s  0:23 left  shard`."""
    share = min(done_bytes / total_bytes, 1.0) if total_bytes else 1.0
    filled = int(share * BAR_WIDTH)
    bar = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] " if with_bar else ""
    line = f"{bar}{share:4.0%}  {readable_bytes(done_bytes)} of {readable_bytes(total_bytes)}"
    if seconds > 0 and done_bytes:
        rate = done_bytes / seconds
        left = max(total_bytes - done_bytes, 0) / rate
        line += f"  {readable_bytes(rate)}/s  {int(left) // 60}:{int(left) % 60:02d} left"
    return f"{line}  {what}"


def readable_bytes(num_bytes: float) -> str:
    """12487168064 -> '12.5 GB'."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
