"""What serving/worker/uvicorn_adapter.py relies on and uvicorn does not publish; a failure says what it is used for."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from serving.worker.http_protocol import HttpProtocol
from serving.worker.uvicorn_adapter import KEEP_ALIVE_SECONDS, SIGNALS, UvicornServer

REQUEST = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n"


def changed(what: str, purpose: str) -> str:
    return f"uvicorn no longer {what}, which serving/worker/uvicorn_adapter.py uses to {purpose}"


@pytest.fixture(autouse=True)
def harmless_signals() -> Iterator[None]:
    """uvicorn raises the signals that it received once more when it has ended: this process must survive them."""
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Application:
    """Takes the adapter's view of the server at its startup, as the service does, and answers when it may."""

    def __init__(self) -> None:
        self.adapter: UvicornServer | None = None
        self.may_answer = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            self.adapter = UvicornServer()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def running(app: Application) -> AsyncIterator[tuple[uvicorn.Server, asyncio.Task[None]]]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="on", log_level="critical"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server, task
    server.should_exit = server.force_exit = True
    await task


async def connect(server: uvicorn.Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", server.servers[0].sockets[0].getsockname()[1])


async def until(is_so: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not is_so():
            await asyncio.sleep(0.01)


def test_the_server_is_found_through_its_signal_handler_and_its_keep_alive_time_set() -> None:
    async def run() -> None:
        app = Application()
        async with running(app) as (server, _):
            assert app.adapter is not None
            assert app.adapter._server is server, changed(
                "installs Server.handle_exit as its signal handler before the application starts",
                "find the server that BentoML keeps to itself",
            )
            assert server.config.timeout_keep_alive == KEEP_ALIVE_SECONDS
            _, writer = await connect(server)
            await until(lambda: server.server_state.connections)
            (connection,) = server.server_state.connections
            assert getattr(connection, "timeout_keep_alive", None) == KEEP_ALIVE_SECONDS, changed(
                "reads Config.timeout_keep_alive for each new connection", "keep idle connections for longer than httpx"
            )
            assert isinstance(connection, HttpProtocol), changed(
                "reads Config.http_protocol_class for each new connection", "serve clients that half-close"
            )
            writer.close()

    asyncio.run(run())


def test_a_connection_shows_its_request_and_whether_the_response_is_complete() -> None:
    async def run() -> None:
        app = Application()
        async with running(app) as (server, _):
            assert hasattr(server.server_state, "connections"), changed(
                "has Server.server_state.connections", "close idle connections"
            )
            reader, writer = await connect(server)
            await until(lambda: server.server_state.connections)
            (connection,) = server.server_state.connections
            for name, purpose in (
                ("cycle", "see whether a connection has a request"),
                ("transport", "close a connection"),
            ):
                assert hasattr(connection, name), changed(f"has `{name}` of a connection", purpose)
            assert connection.cycle is None, changed("has a connection without a request at `cycle` None", "find it")
            writer.write(REQUEST)
            await until(lambda: connection.cycle is not None)
            first = connection.cycle
            assert getattr(first, "response_complete", None) is False, changed(
                "has `cycle.response_complete`", "leave connections alone whose response is not complete"
            )
            app.may_answer.set()
            await reader.readuntil(b"\r\n\r\n")
            await until(lambda: first.response_complete)
            writer.write(REQUEST)
            await reader.readuntil(b"\r\n\r\n")
            assert connection.cycle is not first, changed(
                "makes a new `cycle` for each request of a connection", "see that a connection is in use"
            )
            writer.close()

    asyncio.run(run())


def test_an_intercepted_signal_does_not_end_the_server_until_it_is_passed_on() -> None:
    async def run() -> None:
        app, received = Application(), []
        async with running(app) as (server, task):
            adapter = app.adapter
            assert adapter is not None
            adapter.intercept_signals(lambda number, _: received.append(number))
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: received)
            assert received == [signal.SIGTERM]
            assert not server.should_exit, changed(
                "handles signals with the handlers of the signal module alone", "refuse new requests before it ends"
            )
            adapter.exit(signal.SIGTERM)
            assert server.should_exit
            assert not server.force_exit
            await asyncio.wait_for(task, 5)

    asyncio.run(run())


def test_sigint_after_another_signal_ends_the_server_without_waiting_for_responses() -> None:
    async def run() -> None:
        app = Application()
        async with running(app) as (server, task):
            adapter = app.adapter
            assert adapter is not None
            adapter.intercept_signals(lambda number, _: None)
            _, writer = await connect(server)
            writer.write(REQUEST)
            await until(lambda: server.server_state.connections and next(iter(server.server_state.connections)).cycle)
            adapter.exit(signal.SIGTERM)
            await asyncio.sleep(0.5)
            assert not task.done(), changed("waits for responses after a signal", "let requests in flight finish")
            adapter.exit_without_waiting(signal.SIGTERM)
            assert server.force_exit, changed(
                "takes SIGINT after another signal for `force_exit`", "end without waiting for clients that do not read"
            )
            await asyncio.wait_for(task, 5)
            app.may_answer.set()
            writer.close()

    asyncio.run(run())
