"""Emits words at a fixed rate for `benchmarks.streaming_plain`.

All streams continue in one wake-up of the event loop per tick, as with the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

WORDS = ("你好", "，", "ChatGLM", " is", " a", " model", "。", "我", "是", "人工智能")


class TokenSource:
    """Emits one word per tick in every open stream."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waiting: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    async def words(self, number: int) -> AsyncGenerator[str, None]:
        """`number` words, one per tick."""
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._task = loop.create_task(self._run())
        for index in range(number):
            tick: asyncio.Future[None] = loop.create_future()
            self._waiting.append(tick)
            await tick
            yield WORDS[index % len(WORDS)]

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            waiting, self._waiting = self._waiting, []
            for tick in waiting:
                if not tick.done():
                    tick.set_result(None)
