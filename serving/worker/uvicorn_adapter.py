"""Closes connections on which nothing is asked: uvicorn waits for ever for the first line of a request."""

from __future__ import annotations

import logging
import resource
import signal
import time
from typing import Any
from weakref import WeakKeyDictionary

import uvicorn

IDLE_SECONDS = 30.0  # without a complete head of a request, or after an answer that nobody takes
# uvicorn's 5 s are also httpx's: server and client would let go of a connection while the other just takes it up
KEEP_ALIVE_SECONDS = 20

logger = logging.getLogger(__name__)


class IdleConnections:
    """The open connections of the uvicorn server in this process; none if it is not served by uvicorn."""

    def __init__(self) -> None:
        """Call after the server has taken the signals: its handler is the way to it."""
        handler = signal.getsignal(signal.SIGTERM)
        owner = getattr(handler, "__self__", None)
        self._server = owner if isinstance(owner, uvicorn.Server) else None
        if self._server is not None:
            self._server.config.timeout_keep_alive = KEEP_ALIVE_SECONDS
        # of each connection, the request that it had last, and when it was seen to be over
        self._idle_since: WeakKeyDictionary[Any, tuple[object, float]] = WeakKeyDictionary()

    def sweep(self) -> int:
        """Abort what has been idle too long; how many there were."""
        if self._server is None:
            return 0
        now = time.monotonic()
        num_aborted = 0
        for connection in list(self._server.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            transport = connection.transport
            if cycle is not None and not cycle.response_complete and not transport.is_closing():
                self._idle_since.pop(connection, None)
                continue
            last, since = self._idle_since.setdefault(connection, (cycle, now))
            if last is not cycle:  # it has asked something since the last look, and been answered
                self._idle_since[connection] = (cycle, now)
            elif now - since > IDLE_SECONDS:
                transport.abort()
                num_aborted += 1
        if num_aborted:
            logger.info("closed %d connections on which nothing was asked", num_aborted)
        return num_aborted


def allow_many_connections() -> None:
    """Raise this process's limit of open files to what the system lets it have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
