"""The uvicorn server of this process -> its signals and its idle connections; bytes of a connection -> requests.

This file and http_protocol.py have every use of a name that uvicorn does not publish. Here: the server is found through
its signal handler, and `server_state.connections`, each connection's `cycle` and `transport`, and what SIGINT means
after another signal. tests/unit/test_uvicorn_adapter.py fails when one of them changes.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import uvicorn

from serving.worker.http_protocol import install_protocol

SIGNALS = (signal.SIGTERM, signal.SIGINT)
IDLE_SECONDS = 30.0  # without a complete request head, or after a response that the client does not read
# uvicorn's 5 s are also httpx's: the server would close a connection just as the client reuses it
KEEP_ALIVE_SECONDS = 20

logger = logging.getLogger(__name__)


class UvicornServer:
    """Create it once the server has started, in its event loop's thread. Without uvicorn its methods do nothing."""

    def __init__(self) -> None:
        # BentoML keeps the server object to itself: the signal handler that uvicorn installed leads to it
        owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        self._server = owner if isinstance(owner, uvicorn.Server) else None
        if self._server is not None:
            self._server.config.timeout_keep_alive = KEEP_ALIVE_SECONDS
            install_protocol(self._server.config)
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        # of each connection: its latest request, and when that was first seen to be complete
        self._idle_since: WeakKeyDictionary[Any, tuple[object, float]] = WeakKeyDictionary()

    def intercept_signals(self, received: Callable[[int, FrameType | None], None]) -> None:
        """Have SIGTERM and SIGINT call `received` and not the server, which would stop listening at once."""
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set handlers; tests run servers in others
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, received)

    def exit(self, number: int) -> None:
        """Give the server the intercepted signal: it stops listening, waits for its responses, and ends."""
        handler = self._handlers.get(number)
        if handler is not None:
            handler(number, None)

    def exit_without_waiting(self, number: int) -> None:
        """The same, but without waiting: uvicorn takes a SIGINT that follows another signal for that."""
        self.exit(number)
        self.exit(signal.SIGINT)

    def close_idle_connections(self) -> int:
        """Abort connections that have been idle too long (uvicorn waits for a request's first line for ever).

        Returns how many. Call it about once a second.
        """
        if self._server is None:
            return 0
        now = time.monotonic()
        num_closed = 0
        for connection in list(self._server.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            transport = connection.transport
            if cycle is not None and not cycle.response_complete and not transport.is_closing():
                self._idle_since.pop(connection, None)
                continue
            last, since = self._idle_since.setdefault(connection, (cycle, now))
            if last is not cycle:  # there has been another request since the last call
                self._idle_since[connection] = (cycle, now)
            elif now - since > IDLE_SECONDS:
                transport.abort()
                num_closed += 1
        if num_closed:
            logger.info("closed %d idle connections", num_closed)
        return num_closed
