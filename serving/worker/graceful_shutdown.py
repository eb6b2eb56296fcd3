"""SIGTERM or SIGINT -> new requests are refused, those in flight finish or are aborted, then the server ends.

BentoML's worker is a uvicorn server, which stops listening as soon as it receives a signal: late clients would wait in
the backlog until they are reset, and `/readyz` could not report that this process is leaving. So the first signal only
sets `is_draining`, and uvicorn receives it once no request is in flight.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from types import FrameType

from serving.http.access_middleware import ServerState
from serving.worker.uvicorn_adapter import UvicornServer

POLL_SECONDS = 0.05
ABORT_SECONDS = 5.0  # for aborted requests to send their clients an error

logger = logging.getLogger(__name__)


class GracefulShutdown:
    """One worker's shutdown. For one event loop."""

    def __init__(self, state: ServerState, grace_seconds: float, abort: Callable[[], None]) -> None:
        """abort: ends every generation in flight; called in a thread when the grace period is over."""
        self._state = state
        self._grace_seconds = grace_seconds
        self._abort = abort
        self._task: asyncio.Task[None] | None = None

    def install(self, server: UvicornServer) -> None:
        """Handle this server's signals from now on. Call it once, in the running event loop."""
        loop = asyncio.get_running_loop()

        def received(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._received, server, number)

        server.intercept_signals(received)

    def _received(self, server: UvicornServer, number: int) -> None:
        if self._state.is_draining:
            logger.warning("second signal: shutting down at once with %d requests in flight", self._state.num_in_flight)
            server.exit_without_waiting(number)
            return
        self._state.is_draining = True
        self._task = asyncio.get_running_loop().create_task(self._drain(server, number))

    async def _drain(self, server: UvicornServer, number: int) -> None:
        logger.warning(
            "shutting down: waiting up to %g s for %d requests; a second signal (Ctrl-C) ends them at once",
            self._grace_seconds,
            self._state.num_in_flight,
        )
        if not await self._is_empty_within(self._grace_seconds):
            logger.warning("the grace period is over: aborting %d requests", self._state.num_in_flight)
            await asyncio.to_thread(self._abort)
            if not await self._is_empty_within(ABORT_SECONDS):
                server.exit_without_waiting(number)  # the remaining clients do not read their responses
                return
        server.exit(number)

    async def _is_empty_within(self, seconds: float) -> bool:
        """Whether no request is in flight before so many seconds have passed."""
        end = time.monotonic() + seconds
        while self._state.num_in_flight and time.monotonic() < end:
            await asyncio.sleep(POLL_SECONDS)
        return not self._state.num_in_flight
