"""A request cancelled at any await gives its admission and its slots back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from serving.http.request_context import request_context
from serving.openai.limits import ApiLimits
from serving.openai.start_generation import GenerationStarter
from serving.registry import ModelRegistry, ServedModel
from serving.worker.bentoml_generate import GenerateRequest, generate_text
from tests.contract.tiny import NAME
from tests.contract.worker import Worker, at_rest, body, running_worker

Work = Callable[[], Coroutine[Any, Any, None]]
CHAT = {**body(max_tokens=12), "ignore_eos": True}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT),
    "chat in two answers": ("/v1/chat/completions", {**CHAT, "n": 2}),
    "stream": ("/v1/chat/completions", {**CHAT, "stream": True}),
    "completion of a long text": ("/v1/completions", {"model": CHAT["model"], "prompt": "x" * 100, "max_tokens": 8}),
    "embeddings": ("/v1/embeddings", {"model": CHAT["model"], "input": ["你好", "hello " * 20, "x"]}),
}


class Cancelled:
    """Awaits a coroutine and cancels the task that does so while it waits for the `at`-th time, and, if `is_repeated`,
    every time after that too, as a cancelled scope of anyio does."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], at: int, is_repeated: bool) -> None:
        self._coroutine, self._at, self._is_repeated = coroutine, at, is_repeated
        self.num_waits = 0

    def __await__(self) -> Generator[Any, Any, None]:
        task, steps = asyncio.current_task(), self._coroutine.__await__()
        assert task is not None
        try:
            waits_for = next(steps)
            while True:
                if self.num_waits == self._at or (self._is_repeated and self.num_waits > self._at):
                    task.get_loop().call_soon(task.cancel)
                self.num_waits += 1
                try:
                    sent = yield waits_for
                except BaseException as error:  # noqa: BLE001
                    waits_for = steps.throw(error)
                else:
                    waits_for = steps.send(sent)
        except StopIteration:
            return


async def cancelled_everywhere(worker: Worker, work: Callable[[], Coroutine[Any, Any, None]], is_repeated: bool) -> int:
    """Cancel `work` at its first await, then at its second, and so on until it is not cancelled. Returns how many."""
    for at in range(400):
        stepped = Cancelled(work(), at, is_repeated)

        async def run(stepped: Awaitable[None] = stepped) -> None:
            await stepped

        (result,) = await asyncio.gather(asyncio.create_task(run()), return_exceptions=True)
        assert result is None or isinstance(result, asyncio.CancelledError), result
        await at_rest(worker)
        assert worker.admission.usage_table.in_flight() == (0, 0)
        if stepped.num_waits <= at:
            return at
    raise AssertionError("it never ends")


def asgi(worker: Worker, path: str, payload: dict[str, Any]) -> Coroutine[Any, Any, None]:
    """One request; every receive and send gives other tasks a turn, as a server does."""
    bodies = [json.dumps(payload).encode()]

    async def receive() -> Message:
        await asyncio.sleep(0)
        if not bodies:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    async def send(message: Message) -> None:
        await asyncio.sleep(0)

    headers = [(b"authorization", b"Bearer sk-alice"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": path, "root_path": "", "query_string": b"", "headers": headers,
        "client": ("192.0.2.1", 1), "server": ("test", 80), "scheme": "http", "http_version": "1.1",
    }  # fmt: skip
    return worker.app(scope, receive, send)


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[Worker]:
    with running_worker(folder) as running:
        yield running


@pytest.mark.parametrize("is_repeated", [False, True])
@pytest.mark.parametrize("kind", REQUESTS)
def test_a_request_cancelled_at_any_await_gives_everything_back(worker: Worker, kind: str, is_repeated: bool) -> None:
    path, payload = REQUESTS[kind]
    num_waits = asyncio.run(cancelled_everywhere(worker, lambda: asgi(worker, path, payload), is_repeated))
    assert num_waits >= 2


@pytest.mark.parametrize("is_repeated", [False, True])
def test_generate_cancelled_at_any_await_gives_everything_back(worker: Worker, is_repeated: bool) -> None:
    registry = ModelRegistry([ServedModel(NAME, running=worker.model)])
    generations = GenerationStarter(registry, worker.admission, ApiLimits())

    async def generate() -> None:
        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [], "query_string": b""}
        request_context(scope)
        question = GenerateRequest("你好", "", 0.0, 1.0, 12)
        async with aclosing(generate_text(generations, Request(scope), registry, question)) as texts:
            async for _ in texts:
                await asyncio.sleep(0)

    assert asyncio.run(cancelled_everywhere(worker, generate, is_repeated)) >= 2
