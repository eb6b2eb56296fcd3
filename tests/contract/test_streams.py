"""What happens while an answer is under way: silence, faults, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from starlette.applications import Starlette
from starlette.types import Message

from serving.engine.native.engine import NativeEngine
from serving.generation.pipeline import RunningModel
from serving.openai.limits import ApiLimits
from serving.registry import ModelRegistry
from tests.contract.tiny import NAME, USER, assert_openai_error, chunks, post, sdk, send, serving

MESSAGES: Any = USER
LONG: dict[str, Any] = {"model": NAME, "messages": USER, "max_tokens": 200, "ignore_eos": True, "seed": 1}


def model_of(app: Starlette) -> RunningModel:
    registry: ModelRegistry = app.state.registry
    assert isinstance(registry.default.running, RunningModel)
    return registry.default.running


def engine_of(app: Starlette) -> NativeEngine:
    running = model_of(app).engine
    assert isinstance(running, NativeEngine)
    return running


class FailsAt:
    """Something to do before a forward: nothing, until the given one, which raises."""

    def __init__(self, number: int) -> None:
        self._left = number

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("secret details of the device")


def wait_until(is_true: Callable[[], bool], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if is_true():
            return True
        time.sleep(0.01)
    return False


async def leave(app: Starlette, body: dict[str, Any], after: Callable[[list[Message]], bool]) -> list[Message]:
    """Sends one request over ASGI and disconnects as soon as `after` is true of the messages sent back."""
    sent: list[Message] = []
    is_sent = False

    async def receive() -> Message:
        nonlocal is_sent
        if not is_sent:
            is_sent = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        while not after(sent):
            await asyncio.sleep(0.005)
        return {"type": "http.disconnect"}

    async def keep(message: Message) -> None:
        sent.append(message)
        await asyncio.sleep(0)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/chat/completions",
        "raw_path": b"/chat/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "server": ("test", 80),
        "scheme": "http",
    }
    await asyncio.wait_for(app(scope, receive, keep), 20)
    return sent


@pytest.mark.parametrize("stream", [True, False])
def test_generation_stops_when_the_client_leaves(folder: Path, stream: bool) -> None:
    forwards: list[None] = []

    def slow_step() -> None:
        forwards.append(None)
        time.sleep(0.02)

    with serving(folder, before=slow_step) as app:
        engine = engine_of(app)

        def has_begun(sent: list[Message]) -> bool:
            return len(sent) > 3 if stream else engine.stats().num_running > 0

        sent = asyncio.run(leave(app, {**LONG, "stream": stream}, has_begun))
        assert wait_until(lambda: engine.stats().num_running + engine.stats().num_waiting == 0)
        assert len(forwards) < LONG["max_tokens"] / 2
        assert b"[DONE]" not in b"".join(message.get("body", b"") for message in sent)
        assert post(app, "/chat/completions", {**LONG, "max_tokens": 2}).status_code == 200


def test_every_choice_stops_when_the_client_leaves_before_the_first_token(folder: Path) -> None:
    released = threading.Event()
    with serving(folder, before=lambda: released.wait(5)) as app:
        engine = engine_of(app)
        begun = lambda sent: engine.stats().num_running > 0  # noqa: E731
        sent = asyncio.run(leave(app, {**LONG, "n": 8, "stream": True}, begun))
        released.set()
        assert [message["status"] for message in sent if message["type"] == "http.response.start"] == [499]
        assert wait_until(lambda: engine.stats().num_running + engine.stats().num_waiting == 0)


def test_a_silent_stream_sends_comments(folder: Path) -> None:
    waits = iter([0, 0.3])
    with serving(folder, before=lambda: time.sleep(next(waits, 0)), limits=ApiLimits(ping_seconds=0.05)) as app:
        response = post(app, "/chat/completions", {**LONG, "max_tokens": 4, "stream": True})
        assert ": ping\n\n" in response.text
        assert response.text.endswith("data: [DONE]\n\n")

        async def complete(client: AsyncOpenAI) -> int:
            stream = await client.chat.completions.create(
                model=NAME, messages=MESSAGES, max_tokens=4, stream=True, extra_body={"ignore_eos": True}
            )
            return len([part async for part in stream])

        assert sdk(app, complete) >= 2


def test_a_fault_before_the_first_token_is_a_500_without_details(folder: Path) -> None:
    for stream in (False, True):
        with serving(folder, before=FailsAt(1)) as app:
            response = post(app, "/chat/completions", {**LONG, "max_tokens": 4, "stream": stream})
            error = assert_openai_error(response, 500)
            assert (error["type"], error["code"]) == ("server_error", "server_error")
            assert "secret" not in response.text
            assert post(app, "/chat/completions", {**LONG, "max_tokens": 4}).status_code == 200


def test_a_fault_in_a_stream_is_an_event_that_the_sdk_raises(folder: Path) -> None:
    with serving(folder, before=FailsAt(6)) as app:
        response = post(app, "/chat/completions", {**LONG, "stream": True})
        assert response.status_code == 200
        last = response.text.rstrip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_error"
        assert "secret" not in response.text
        assert "[DONE]" not in response.text
    with serving(folder, before=FailsAt(6)) as app:

        async def complete(client: AsyncOpenAI) -> None:
            async for _ in await client.chat.completions.create(model=NAME, messages=MESSAGES, stream=True):
                pass

        with pytest.raises(openai.APIError, match="The server had an error"):
            sdk(app, complete)


def test_a_fault_while_collecting_is_a_500(folder: Path) -> None:
    with serving(folder, before=FailsAt(6)) as app:
        assert_openai_error(post(app, "/chat/completions", LONG), 500)


def test_a_stopped_engine_is_a_503_to_be_tried_again(folder: Path) -> None:
    with serving(folder) as app:
        engine_of(app).stop()
        response = post(app, "/chat/completions", LONG)
        assert assert_openai_error(response, 503)["type"] == "server_error"
        assert response.headers["retry-after"]


def test_an_answer_that_can_never_fit_the_cache_is_a_400(folder: Path) -> None:
    with serving(folder) as app:
        object.__setattr__(model_of(app), "context_length", 100_000)  # more than the cache of this engine holds
        error = assert_openai_error(post(app, "/chat/completions", {**LONG, "max_tokens": 50_000}), 400)
        assert error["code"] == "context_length_exceeded"


def test_headers_of_a_stream_keep_proxies_from_holding_it_back(app: Starlette) -> None:
    response = send(app, "POST", "/chat/completions", json={**LONG, "max_tokens": 2, "stream": True})
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    assert not any(line.startswith(("id:", "retry:", "event:")) for line in response.text.splitlines())


def test_tokens_without_text_send_nothing(app: Starlette) -> None:
    """Bytes of an incomplete character give no event, and no comment as a silent stream does."""
    response = post(app, "/chat/completions", {**LONG, "stream": True, "stream_options": {"include_usage": True}})
    parts = chunks(response)
    assert len(parts) < parts[-1]["usage"]["completion_tokens"]
    assert ": ping" not in response.text


def test_a_stream_says_how_far_a_long_prompt_is(folder: Path) -> None:
    long = {"model": NAME, "messages": [{"role": "user", "content": "你好" * 1500}], "max_tokens": 2, "stream": True}
    limits = ApiLimits(progress_seconds=0.05)
    with serving(folder, before=lambda: time.sleep(0.2), limits=limits, context=8192) as app:
        text = post(app, "/chat/completions", long).text
    comments = re.findall(r"^: prefill ([\d,]+)/([\d,]+)$", text, re.MULTILINE)
    found = [tuple(int(number.replace(",", "")) for number in pair) for pair in comments]
    assert len(found) >= 3
    assert found == sorted(found)
    assert len({total for _, total in found}) == 1
    assert found[0][0] < found[-1][0] <= found[0][1]
    assert text.endswith("data: [DONE]\n\n")
