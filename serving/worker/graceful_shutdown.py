"""The way out: refuse what is new, let what is running finish, then let the server end. Knows signals, no requests.

BentoML's worker is a uvicorn server, which stops listening as soon as it is told to end: late clients would hang in the
backlog and `/readyz` could not say that this process is leaving. So the first signal only begins the drain, and uvicorn
is told when the drain is over.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL_SECONDS = 0.05
CUT_SECONDS = 5.0  # for the requests that were cut off to say so to their clients

logger = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], Any]


class GracefulShutdown:
    """Counts requests in flight and stands between the signals and the server. For one event loop."""

    def __init__(self, grace_seconds: float, cut: Callable[[], None]) -> None:
        """cut: ends every generation in flight; called in a thread when the grace period is over."""
        self.num_in_flight = 0
        self.is_draining = False
        self._grace_seconds = grace_seconds
        self._cut = cut
        self._handlers: dict[int, Handler] = {}
        self._task: asyncio.Task[None] | None = None

    def install(self) -> None:
        """Take the signals over from the server. Call in the main thread, with the loop running, once."""
        if threading.current_thread() is not threading.main_thread():
            return  # in a test's thread: signals belong to the main one
        loop = asyncio.get_running_loop()

        def received(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._received, number)

        for number in SIGNALS:
            before = signal.getsignal(number)
            if callable(before):
                self._handlers[number] = before
                signal.signal(number, received)

    def _received(self, number: int) -> None:
        if not self.is_draining:
            self.is_draining = True
            self._task = asyncio.get_running_loop().create_task(self._finish(number))
            return
        logger.warning("a second signal: ending at once with %d requests in flight", self.num_in_flight)
        self._pass_on(number)
        self._pass_on(signal.SIGINT)  # which uvicorn takes, after another one, for "do not wait"

    def _pass_on(self, number: int) -> None:
        handler = self._handlers.get(number)
        if handler is not None:
            handler(number, None)

    async def _finish(self, number: int) -> None:
        logger.warning("draining %d requests for up to %g s", self.num_in_flight, self._grace_seconds)
        if not await self._empty_within(self._grace_seconds):
            logger.warning("the grace period is over: %d requests are cut off", self.num_in_flight)
            await asyncio.to_thread(self._cut)
            if not await self._empty_within(CUT_SECONDS):
                self._pass_on(number)
                number = signal.SIGINT  # whoever is left does not read any more
        self._pass_on(number)

    async def _empty_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self.num_in_flight and time.monotonic() < end:
            await asyncio.sleep(POLL_SECONDS)
        return not self.num_in_flight
