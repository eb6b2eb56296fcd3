"""Bodies of every route under one set of limits, through a real uvicorn server: size, time, shape, type and number."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from serving.http import json_body
from serving.http.access_middleware import AccessMiddleware, AccessPolicy, RouteNames, ServerState
from serving.http.errors import APIError
from serving.http.json_body import BodyLimits, BodyMiddleware, check_shape
from tests.contract.tiny import assert_openai_error
from tests.contract.worker import CHAT, body, client, running_worker

LIMITS = BodyLimits(max_bytes=100_000, max_depth=8, max_containers=1000, max_values=5000)


class ForeignRoute:
    """A route of another framework, which reads and parses the body itself, like BentoML's /generate."""

    def __init__(self) -> None:
        self.num_requests = 0

    async def respond(self, request: Request) -> Response:
        self.num_requests += 1
        size = len(await request.body())
        return JSONResponse({"size": size, "keys": len(await request.json())})


@asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[int]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="critical"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = server.force_exit = True
    await serving


@asynccontextmanager
async def foreign(limits: BodyLimits = LIMITS) -> AsyncIterator[tuple[ForeignRoute, httpx2.AsyncClient, int]]:
    route = ForeignRoute()
    app = BodyMiddleware(Starlette(routes=[Route("/generate", route.respond, methods=["POST"])]), limits)
    policy = AccessPolicy(None, ServerState())
    async with (
        listening(AccessMiddleware(app, policy, RouteNames([]))) as port,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http,
    ):
        yield route, http, port


BOMBS = {
    "objects": b'{"a":[' + b",".join([b"{}"] * 2000) + b"]}",
    "arrays": b'{"a":[' + b"[]," * 2000 + b"[]]}",
    "numbers": b'{"a":[' + b"1," * 6000 + b"1]}",
    "strings": b'{"a":[' + b'"",' * 6000 + b'""]}',
    "keys": b"{" + b",".join(b'"%d":1' % i for i in range(6000)) + b"}",
    "depth": b'{"a":' + b"[" * 20 + b"]" * 20 + b"}",
    "open": b"[" * 50_000,
    "escaped quotes": b'{"a":["' + b'\\\\","' * 6000 + b'"]}',
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS.keys())
def test_a_body_of_a_costly_shape_is_a_400_before_any_framework_parses_it(content: bytes) -> None:
    async def run() -> None:
        async with foreign() as (route, http, _):
            reply = await http.post("/generate", content=content)
            assert assert_openai_error(reply, 400)["code"] == "invalid_json"
            assert route.num_requests == 0

    asyncio.run(run())


def test_an_honest_body_reaches_the_framework_as_it_was_sent() -> None:
    text = {"prompt": 'brackets [[[[[[[[[[{{{{{{{{ and "quotes\\" and \\\\ ' * 1000, "ids": list(range(4000))}

    async def run() -> None:
        async with foreign() as (_, http, _):
            content = json.dumps(text).encode()
            assert (await http.post("/generate", content=content)).json() == {"size": len(content), "keys": 2}
            for doubled in ("application/json, application/json", "application/json;charset=utf-8,application/json"):
                reply = await http.post("/generate", content=content, headers={"content-type": doubled})
                assert reply.status_code == 200

    asyncio.run(run())


def test_large_compressed_and_wrongly_typed_bodies_do_not_reach_a_framework() -> None:
    async def run() -> None:
        async with foreign() as (route, http, _):
            large = await http.post("/generate", content=b"x" * 150_000)
            assert assert_openai_error(large, 413)["code"] == "request_too_large"
            compressed = await http.post("/generate", content=b"{}", headers={"content-encoding": "gzip"})
            assert_openai_error(compressed, 415)
            form = await http.post("/generate", files={"prompt": b"x"})
            assert assert_openai_error(form, 400)["code"] == "unsupported_content_type"
            assert route.num_requests == 0

    asyncio.run(run())


def test_a_slow_body_is_a_408_on_every_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.http.json_body.BODY_SECONDS", 0.2)

    async def run() -> None:
        async with foreign() as (route, _, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /generate HTTP/1.1\r\nhost: test\r\ncontent-length: 10\r\n\r\n{")
            assert b" 408 " in await asyncio.wait_for(reader.readline(), 10)
            assert route.num_requests == 0
            writer.close()

    asyncio.run(run())


def test_a_huge_body_is_read_no_further_than_a_few_times_the_limit() -> None:
    async def run() -> None:
        async with foreign() as (route, _, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /generate HTTP/1.1\r\nhost: test\r\ncontent-length: 1000000000000\r\n\r\n")
            writer.write(b"x" * (LIMITS.max_bytes * (json_body.DRAIN_FACTOR + 1)))
            assert b" 413 " in await asyncio.wait_for(reader.readline(), 10)
            assert route.num_requests == 0
            writer.close()

    asyncio.run(run())


def test_bodies_of_unanswered_requests_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_body, "BUFFER_FACTOR", 1)
    released = asyncio.Event()

    async def wait(request: Request) -> Response:
        await request.body()
        await released.wait()
        return Response()

    async def run() -> None:
        app = BodyMiddleware(Starlette(routes=[Route("/generate", wait, methods=["POST"])]), LIMITS)
        async with (
            listening(AccessMiddleware(app, AccessPolicy(None, ServerState()), RouteNames([]))) as port,
            httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http,
        ):
            content = b'"' + b"x" * 90_000 + b'"'
            waiting = [asyncio.create_task(http.post("/generate", content=content)) for _ in range(2)]
            while app._num_buffered < 2 * len(content):
                await asyncio.sleep(0.01)
            assert_openai_error(await http.post("/generate", content=content), 429)
            released.set()
            assert [(await reply).status_code for reply in waiting] == [200, 200]
            assert (await http.post("/generate", content=content)).status_code == 200

    asyncio.run(run())


def test_requests_beyond_the_number_in_flight_are_a_429_and_health_is_not(folder: Path) -> None:
    async def run() -> None:
        with running_worker(folder) as worker:
            worker.state.num_in_flight = 4096
            async with client(worker) as http:
                reply = await http.post(CHAT, json=body())
                assert assert_openai_error(reply, 429)["code"] == "rate_limit_exceeded"
                assert reply.headers["retry-after"] == "1"
                worker.state.num_in_flight = 0
                assert (await http.post(CHAT, json=body(max_tokens=1))).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "is_accepted"),
    [
        (b'{"a":"[[[[[[[[[[[[[["}', True),
        (b'{"a":"\\"[[[[[[[[[[[[[["}', True),
        (b'{"a":"\\\\",' + b'"b":[[[[[[[[[[]]]]]]]]]]}', False),
        (b'{"a":[[[[[[[]]]]]]]}', True),
        (b'{"a":[[[[[[[[]]]]]]]]}', False),
        (b"]]]]]]]]]][[[[[[[[[[", False),
    ],
)
def test_only_brackets_outside_strings_nest(text: bytes, is_accepted: bool) -> None:
    if is_accepted:
        check_shape(text, LIMITS)
    else:
        with pytest.raises(APIError):
            check_shape(text, LIMITS)
