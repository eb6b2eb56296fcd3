"""A function -> the CPU time that it takes, in seconds of this thread or in units of this machine's speed."""

from __future__ import annotations

import time
from collections.abc import Callable


def cpu_seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """The least of `repeats`, of this thread alone."""
    times: list[float] = []
    for _ in range(repeats):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return min(times)


def million_steps(function: Callable[[], object]) -> float:
    """CPU time in units of a million steps of a Python loop, measured beside it: a limit in such units holds on slow
    and on busy machines."""
    return cpu_seconds(function, repeats=2) / cpu_seconds(_loop)


def _loop() -> int:
    return sum(i & 7 for i in range(1_000_000))
