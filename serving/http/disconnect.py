"""Notices that a client has left while its answer is being made. Knows nothing of the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Message, Receive, Send

T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody is there to read the answer."""


class WriteTimeout:
    """Sends on, and knows since when the reader has let a send wait."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send = send
        self._seconds = seconds
        self._since: float | None = None

    async def __call__(self, message: Message) -> None:
        self._since = time.monotonic()
        await self._send(message)
        self._since = None

    async def run_out(self) -> None:
        """Returns when one send has waited too long."""
        while self._since is None or time.monotonic() - self._since < self._seconds:
            await asyncio.sleep(self._seconds / 4)


async def unless_disconnected(
    receive: Receive, work: Coroutine[Any, Any, T], patience: WriteTimeout | None = None
) -> T:
    """The result of `work`, which is cancelled when the client leaves first or does not read. Raises ClientLeft then.

    `receive` must have delivered the whole request body before.
    """
    working = asyncio.create_task(work)
    watching = [asyncio.create_task(wait_for_disconnect(receive))]
    if patience is not None:
        watching.append(asyncio.create_task(patience.run_out()))
    try:
        await asyncio.wait((working, *watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        working.cancel()
        for task in watching:
            task.cancel()
        # cancelled work still has to give back what it holds
        await asyncio.gather(working, *watching, return_exceptions=True)


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
