"""NaN and infinity fail only the request that they come from: a real network with one broken embedding row."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette

from models.networks.transformers_decoder import TransformersDecoder
from serving.engine.interface import EngineLimits
from serving.engine.native.engine import NativeEngine
from serving.engine.outputs import NotFinite
from serving.generation.pipeline import RunningModel
from tests.contract.tiny import (
    CONTEXT,
    NAME,
    HookedNetwork,
    Scripted,
    assert_openai_error,
    chat_format,
    in_front_of,
    post,
    random_glm,
    serving,
)
from tests.tiny import greedy, tokens

POISON = "z"  # a letter of the vocabulary that no other text here has
SHARED = "Hello world, how are you today? 你好，世界。 The quick brown fox 0123456789. "
HEALTHY = [f"{SHARED}{word}" for word in ("我是", "Hello", "fox", "世界")]


@contextmanager
def poisoned(
    folder: Path, value: float = float("nan"), script: str = "", max_batch_tokens: int = 16
) -> Iterator[Starlette]:
    """Small chunks, so that a broken prompt is in the cache for many steps before its answer begins."""
    form = chat_format(folder, "chatglm2")
    model = random_glm(form.num_tokens)
    (token_id,) = set(form.encode(f"a{POISON}")) - set(form.encode("a"))
    model.get_input_embeddings().weight.data[token_id] = value
    network: Any = TransformersDecoder(model, num_tokens=form.num_tokens, max_positions=CONTEXT)
    if script:
        network = Scripted(network, form.encode(script)[2:])
    engine = NativeEngine(network, EngineLimits(max_batch_tokens=max_batch_tokens, kv_tokens=4096))
    engine.start()
    with in_front_of(RunningModel(engine, form, CONTEXT)) as app:
        yield app


def question(text: str, stream: bool = False) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 24, "stream": stream}


async def together(app: Starlette, bodies: list[dict[str, Any]]) -> list[httpx2.Response]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as http:
        return await asyncio.gather(*(http.post("/chat/completions", json=body) for body in bodies))


def content(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[str]:
    """The answers of the same network without the broken row."""
    with serving(folder) as app:
        return [content(post(app, "/chat/completions", question(text))) for text in HEALTHY]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_batch_tokens", [16, 512])
def test_a_broken_request_gets_a_clear_500_and_its_neighbours_their_answers(
    folder: Path, expected: list[str], value: float, max_batch_tokens: int
) -> None:
    sick = f"{SHARED}{POISON} and a long end: {SHARED}"
    with poisoned(folder, value, max_batch_tokens=max_batch_tokens) as app:
        bodies = [question(sick), question(HEALTHY[0]), question(sick, stream=True), *map(question, HEALTHY[1:])]
        replies = asyncio.run(together(app, bodies))
        for reply in (replies[0], replies[2]):
            error = assert_openai_error(reply, 500)
            assert error["code"] == "numbers_not_finite"
            assert "NaN or infinity" in error["message"]
            assert reply.headers["x-should-retry"] == "false"
        assert [content(reply) for reply in (replies[1], *replies[3:])] == expected
        assert [content(post(app, "/chat/completions", question(text))) for text in HEALTHY] == expected


def test_nothing_of_a_broken_prompt_is_left_for_those_who_begin_alike() -> None:
    """A kernel multiplies what a row may not see by 0, and 0 * NaN is NaN: in the chunk of the broken token the tokens
    before it are spoiled too. Who shared that beginning, while the rest of the prompt went through, failed with it."""
    beginning, broken, num_tokens = list(range(20, 60)), 7, 300
    steps, released = itertools.count(1), threading.Event()

    def before() -> None:
        if next(steps) == 4:  # the chunk behind the broken one, if there is still a use for it
            released.wait(5)

    def engine_with(value: float, hook: Callable[[], None]) -> NativeEngine:
        model = random_glm(num_tokens)
        model.get_input_embeddings().weight.data[broken] = value
        network = HookedNetwork(TransformersDecoder(model, num_tokens=num_tokens, max_positions=CONTEXT), hook)
        return NativeEngine(network, EngineLimits(max_batch_tokens=16, kv_tokens=4096))

    async def run() -> list[int]:
        sick = asyncio.create_task(tokens(engine, [*beginning, broken, *beginning], greedy(4)))
        while next(copy(steps)) < 5 and not sick.done():
            await asyncio.sleep(0.01)
        healthy = asyncio.create_task(tokens(engine, [*beginning, 99], greedy(8)))
        await asyncio.sleep(0.05)
        released.set()
        with pytest.raises(NotFinite):
            await sick
        return await healthy

    engine = engine_with(float("nan"), before)
    engine.start()
    answer = asyncio.run(run())
    engine.stop()
    engine = engine_with(0.0, lambda: None)
    engine.start()
    assert answer == asyncio.run(tokens(engine, [*beginning, 99], greedy(8)))
    engine.stop()


def test_a_failure_in_the_middle_of_a_stream_says_the_same(folder: Path) -> None:
    with poisoned(folder, script=f"a{POISON}") as app:
        response = post(app, "/chat/completions", question("Hello", stream=True))
    assert response.status_code == 200
    last = [line for line in response.text.split("\n\n") if line][-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "numbers_not_finite")


def test_an_embedding_that_is_not_finite_fails_too(folder: Path) -> None:
    with poisoned(folder) as app:
        error = assert_openai_error(post(app, "/embeddings", {"model": NAME, "input": ["fox", POISON]}), 500)
        assert error["code"] == "numbers_not_finite"
        assert post(app, "/embeddings", {"model": NAME, "input": "fox"}).status_code == 200
