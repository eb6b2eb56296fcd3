"""Bytes of a connection -> requests and responses, where uvicorn's protocol differs from what HTTP clients may do.

- A client may close its sending side once its request is complete (half-close) and still read the response.
- An offer to upgrade the protocol (`Upgrade: h2c`, Java's HttpClient) is ignored. httptools takes it for accepted: it
  drops the body and parses it as the next request.
- HTTP/1.0 has no chunks: a response of unknown length ends with the connection.

The names that uvicorn does not publish: HttpToolsProtocol with its `cycle`, `scheme`, `scope` and `parser`, and the
cycle's `more_body`, `response_started`, `response_complete`, `keep_alive`, `chunked_encoding` and
`expected_content_length`. tests/contract/test_http_protocol.py fails when one of them changes.
"""

from __future__ import annotations

import re
import socket
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

UPGRADE = re.compile(rb"(?<=\n)upgrade:", re.IGNORECASE)
IGNORED = b"x-offer:"  # of the same length
UPGRADE_BEGINS = re.compile(rb"(?<=\n)u(?:p(?:g(?:r(?:a(?:d(?:e)?)?)?)?)?)?\Z", re.IGNORECASE)
HEAD_END = b"\r\n\r\n"

INTERIM_RESPONSE = b"HTTP/1.1 100 Continue\r\n\r\n"  # of all 1xx the one that every client skips
PROBE_SECONDS = 5.0  # between two interim responses to a client that has closed its sending side
CHECK_SECONDS = (0.005, 0.02, 0.1, 0.25)  # until the connection is checked for a reset; the last one repeats


def install_protocol(config: uvicorn.Config) -> None:
    """Have connections that this server accepts from now on use the protocol below. Only for httptools."""
    if isinstance(config.http_protocol_class, type) and issubclass(config.http_protocol_class, HttpToolsProtocol):
        config.http_protocol_class = HttpProtocol


class HttpProtocol(HttpToolsProtocol):
    """One connection. For one event loop, asyncio's or uvloop's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_head = True
        self._last_bytes = b""  # up to three that the parser has got of the present head
        self._held_back = b""  # the beginning of what may become an Upgrade header

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            data = self._without_upgrade(data)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.send = partial(_send_until_close, self.cycle)  # type: ignore[method-assign]

    def on_message_complete(self) -> None:
        self._is_in_head, self._last_bytes = True, b""
        super().on_message_complete()

    def _without_upgrade(self, data: bytes) -> bytes:
        """The same bytes with an Upgrade header renamed; those that may become one are held back for the next call."""
        num_seen = len(self._last_bytes)
        text = self._last_bytes + self._held_back + data
        self._held_back = b""
        end = text.find(HEAD_END)
        if end >= 0:
            text = UPGRADE.sub(IGNORED, text[:end]) + text[end:]
        else:
            text = UPGRADE.sub(IGNORED, text)
            if begins := UPGRADE_BEGINS.search(text):
                text, self._held_back = text[: begins.start()], begins[0]
            self._last_bytes = text[-3:]
        return text[num_seen:]

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """True keeps the connection for the response under way; the client sends no more, but may still read.

        TCP does not tell a client that has closed its sending side from one that has closed the connection: only the
        latter answers bytes with a reset. HTTP/1.0 has no interim responses, and is what proxies speak that close the
        connection when their client leaves: there the end of input is the end unless the response has started.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or self.scheme == "https":
            return None
        if cycle.scope["http_version"] == "1.0" and not cycle.response_started:
            return None
        cycle.keep_alive = False
        self._probe(cycle)
        self._check(cycle, 0)
        return True

    def _probe(self, cycle: RequestResponseCycle) -> None:
        """Send an interim response now and then; once the response has started, its own bytes are the probe."""
        if self.transport.is_closing() or cycle.response_complete:
            return
        if not cycle.response_started and not self.pipeline:
            self.transport.write(INTERIM_RESPONSE)
        self.loop.call_later(PROBE_SECONDS, self._probe, cycle)

    def _check(self, cycle: RequestResponseCycle, num_checks: int) -> None:
        """Abort the connection if the client has reset it: after the end of input, the event loop does not notice."""
        if self.transport.is_closing() or cycle.response_complete:
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        seconds = CHECK_SECONDS[min(num_checks, len(CHECK_SECONDS) - 1)]
        self.loop.call_later(seconds, self._check, cycle, num_checks + 1)


async def _send_until_close(cycle: RequestResponseCycle, message: Any) -> None:
    """`cycle.send` for HTTP/1.0: a body without a length is sent as it is, and the connection's end is its end."""
    if message["type"] == "http.response.start":
        if all(name.lower() != b"content-length" for name, _ in message.get("headers", [])):
            cycle.chunked_encoding = False
            cycle.is_close_delimited = True  # type: ignore[attr-defined]
    elif getattr(cycle, "is_close_delimited", False) and cycle.scope["method"] != "HEAD":
        cycle.expected_content_length = len(message.get("body", b""))
    await RequestResponseCycle.send(cycle, message)
