"""Connections of a real uvicorn server in front of the application: the idle ones are closed, the others kept."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import uvicorn

from serving.worker.uvicorn_adapter import UvicornServer
from tests.contract.worker import Worker, body, running_worker


@asynccontextmanager
async def listening(worker: Worker) -> AsyncIterator[int]:
    """Serve it as BentoML does; the port on loopback."""
    server = uvicorn.Server(uvicorn.Config(worker.app, port=0, lifespan="off", log_level="critical"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


def test_connections_without_a_complete_request_are_closed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.worker.uvicorn_adapter.IDLE_SECONDS", 0.2)

    async def run() -> None:
        with running_worker(folder, lambda: time.sleep(0.01)) as worker:
            async with listening(worker) as port:
                server = UvicornServer()
                slow_reader, slow_writer = await asyncio.open_connection("127.0.0.1", port)
                slow_writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost:")
                busy_reader, busy_writer = await asyncio.open_connection("127.0.0.1", port)
                payload = json.dumps(body(max_tokens=60, ignore_eos=True, stream=True)).encode()
                busy_writer.write(
                    b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\nauthorization: Bearer sk-alice\r\n"
                    b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(payload), payload)
                )
                closed = 0
                for _ in range(5):
                    await asyncio.sleep(0.1)
                    closed += server.close_idle_connections()
                assert closed == 1
                with suppress(ConnectionResetError):
                    assert await slow_reader.read() == b""
                assert b"[DONE]" in await busy_reader.read()
                for writer in (slow_writer, busy_writer):
                    writer.close()

    asyncio.run(run())


def test_a_connection_with_one_short_request_after_another_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check finds it between two requests; it must not add these pauses up."""
    monkeypatch.setattr("serving.worker.uvicorn_adapter.IDLE_SECONDS", 0.3)

    async def run() -> None:
        with running_worker(folder) as worker:
            async with listening(worker) as port:
                server = UvicornServer()
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                for _ in range(8):
                    writer.write(b"GET /v1/models HTTP/1.1\r\nhost: test\r\nauthorization: Bearer sk-alice\r\n\r\n")
                    head = await reader.readuntil(b"\r\n\r\n")
                    assert head.startswith(b"HTTP/1.1 200")
                    (size,) = re.findall(rb"content-length: (\d+)", head)
                    await reader.readexactly(int(size))
                    await asyncio.sleep(0.1)
                    assert server.close_idle_connections() == 0
                for _ in range(4):
                    await asyncio.sleep(0.1)
                    server.close_idle_connections()
                assert await reader.read() == b""
                writer.close()

    asyncio.run(run())
