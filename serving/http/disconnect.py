"""A coroutine and its client's connection -> the coroutine's result, unless the client disconnects or stops reading."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Message, Receive, Send

T = TypeVar("T")


class ClientLeft(Exception):
    """The client has disconnected, or reads no more of the answer."""


class WriteTimeout:
    """An ASGI `send` that measures how long its present message has been waiting for the client."""

    def __init__(self, send: Send, max_seconds: float) -> None:
        self._send = send
        self._max_seconds = max_seconds
        self._since: float | None = None

    async def __call__(self, message: Message) -> None:
        self._since = time.monotonic()
        await self._send(message)
        self._since = None

    async def expired(self) -> None:
        """Returns when one message has waited too long. Polls: a timer for each message costs more than the message."""
        while self._since is None or time.monotonic() - self._since < self._max_seconds:
            await asyncio.sleep(self._max_seconds / 4)


async def unless_disconnected(
    receive: Receive, work: Coroutine[Any, Any, T], write_timeout: WriteTimeout | None = None
) -> T:
    """The result of `work`, which is cancelled when the client leaves or stops reading. Raises ClientLeft then.

    `receive` must have delivered the whole request body before.
    """
    working = asyncio.create_task(work)
    watching = [asyncio.create_task(_disconnected(receive))]
    if write_timeout is not None:
        watching.append(asyncio.create_task(write_timeout.expired()))
    try:
        await asyncio.wait((working, *watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        for task in (working, *watching):
            task.cancel()
        await asyncio.gather(working, *watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
