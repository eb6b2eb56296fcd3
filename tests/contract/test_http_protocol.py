"""HTTP as clients speak it, through a real uvicorn server on both event loops: half-close, upgrade offers, HTTP/1.0."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.worker.http_protocol import install_protocol
from tests.contract.worker import CHAT, at_rest, body, running_worker

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
both_loops = pytest.mark.parametrize("loop", LOOPS)


def run(loop: str, work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(work)


@asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[int]:
    config = uvicorn.Config(app, port=0, lifespan="off", log_level="critical")
    config.load()
    install_protocol(config)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = server.force_exit = True
    await serving


def request_of(payload: dict[str, Any], version: str = "1.1", path: str = CHAT, more: bytes = b"") -> bytes:
    content = json.dumps(payload).encode()
    head = f"POST {path} HTTP/{version}\r\nhost: test\r\nauthorization: Bearer sk-alice\r\n".encode()
    return head + more + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content) + content


def final_response(received: bytes) -> tuple[bytes, bytes]:
    """Head and body of the response after the interim ones."""
    while received.startswith(b"HTTP/1.1 100"):
        received = received.partition(b"\r\n\r\n")[2]
    head, _, content = received.partition(b"\r\n\r\n")
    return head.lower(), content


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body that arrived, and with the names of the headers."""
    request = Request(scope, receive)
    content = await request.body()
    await Response(content, headers={"x-names": " ".join(request.headers.keys())})(scope, receive, send)


@both_loops
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_slow", [False, True])
def test_a_client_that_has_closed_its_sending_side_gets_its_whole_answer(
    loop: str, stream: bool, is_slow: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.worker.http_protocol.PROBE_SECONDS", 0.05)

    async def work() -> None:
        with running_worker(folder, lambda: time.sleep(0.05 if is_slow else 0)) as worker:
            async with listening(worker.app) as port:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request_of(body(max_tokens=8, ignore_eos=True, stream=stream)))
                writer.write_eof()
                head, content = final_response(await asyncio.wait_for(reader.read(), 20))
                assert head.startswith(b"http/1.1 200")
                assert b"connection: close" in head
                if stream:
                    assert content.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
                else:
                    assert json.loads(content)["usage"]["completion_tokens"] == 8
                writer.close()
                await at_rest(worker)
                assert not worker.records[0].is_aborted

    run(loop, work())


@both_loops
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("half_first", [False, True])
def test_a_client_that_leaves_cancels_its_generation(
    loop: str, stream: bool, half_first: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if half_first:  # without it, the first interim response must do
        monkeypatch.setattr("serving.worker.http_protocol.PROBE_SECONDS", 0.2)

    async def work() -> None:
        with running_worker(folder, lambda: time.sleep(0.02)) as worker:
            async with listening(worker.app) as port:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request_of(body(max_tokens=200, ignore_eos=True, stream=stream)))
                while not worker.engine.is_busy:
                    await asyncio.sleep(0.005)
                if half_first:
                    writer.write_eof()
                    await asyncio.sleep(0.1)
                if stream:
                    await reader.readuntil(b"data: ")
                writer.close()
                while not worker.records:
                    await asyncio.sleep(0.01)
                assert worker.records[0].is_aborted
                assert worker.engine.stats().generated_tokens < 150
                await at_rest(worker)

    run(loop, work())


def test_the_end_of_input_without_a_complete_request_closes_the_connection() -> None:
    async def work() -> None:
        async with listening(echo) as port:
            for sent in (
                b"",
                b"POST / HTTP/1.1\r\nhost: x\r\n",
                b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{",
            ):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(sent)
                writer.write_eof()
                assert await asyncio.wait_for(reader.read(), 5) == b""
                writer.close()

    run("asyncio", work())


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"


@both_loops
def test_an_offer_to_upgrade_is_ignored_wherever_the_bytes_are_split(loop: str) -> None:
    async def work() -> None:
        payload = {"prompt": "Upgrade: h2c " * 10}
        sent = request_of(payload, more=OFFER)
        begin = sent.index(b"Upgrade: h2c\r\n")
        content = sent.partition(b"\r\n\r\n")[2]
        splits = [[i] for i in (0, 5, *range(begin - 3, begin + 16), len(sent) - len(content) - 2, len(sent) - 3)]
        splits += [list(range(begin - 4, begin + 12)), list(range(1, len(sent)))]
        async with listening(echo) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.get_extra_info("socket").setsockopt(6, 1, 1)  # TCP_NODELAY: each piece is a segment
            for positions in splits:
                for start, end in zip([0, *positions], [*positions, len(sent)], strict=True):
                    writer.write(sent[start:end])
                    await asyncio.sleep(0.001)
                head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).lower()
                assert head.startswith(b"http/1.1 200"), positions
                assert b" upgrade" not in head.partition(b"x-names:")[2], positions
                assert await reader.readexactly(len(content)) == content
            writer.close()

    run(loop, work())


def test_a_body_is_never_changed() -> None:
    async def work() -> None:
        async with listening(echo) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            content = b"\r\nUpgrade: h2c\r\nupgrade:\n" * 100 + b"\r\nupgr"
            head = b"POST / HTTP/1.1\r\nhost: x\r\nUPGRADE: h2c\r\nconnection: upgrade\r\ncontent-length: %d\r\n\r\n"
            for size in (7, 100_000):
                sent = head % len(content) + content
                for start in range(0, len(sent), size):
                    writer.write(sent[start : start + size])
                    await asyncio.sleep(0)
                answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
                assert answer.startswith(b"HTTP/1.1 200")
                assert await reader.readexactly(len(content)) == content
            writer.close()

    run("asyncio", work())


@both_loops
def test_a_response_to_http_1_0_has_no_chunks(loop: str, folder: Path) -> None:
    async def ask(port: int, payload: dict[str, Any]) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_of(payload, version="1.0"))
        head, content = final_response(await asyncio.wait_for(reader.read(), 20))
        writer.close()
        return head, content

    async def work() -> None:
        with running_worker(folder) as worker:
            async with listening(worker.app) as port:
                head, content = await ask(port, body(max_tokens=4, ignore_eos=True, stream=True))
                assert b"transfer-encoding" not in head
                assert b"connection: close" in head
                assert content.startswith(b"data: {")
                assert content.endswith(b"data: [DONE]\n\n")
                head, content = await ask(port, body(max_tokens=4, ignore_eos=True))
                assert b"content-length: %d" % len(content) in head
                assert json.loads(content)["usage"]["completion_tokens"] == 4

    run(loop, work())
