"""The event loop goes on during costly requests: CPU time that its thread spends between two of its turns."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette

from serving.http.json_body import BodyMiddleware
from serving.http.server_sent_events import to_json, to_json_slices
from serving.openai.limits import ApiLimits
from tests.contract.tiny import NAME, USER, serving

ROUND = [*USER, {"role": "assistant", "content": "hi"}]
MAX_TURN_SECONDS = 0.1  # CPU time of the loop's thread, however busy the machine is; building on the loop takes longer


@pytest.fixture(scope="module")
def roomy(folder: Path) -> Iterator[Starlette]:
    with serving(folder, context=2048) as application:
        gc.collect()
        gc.freeze()  # as service.py does
        yield application
        gc.unfreeze()


def longest_turn(app: Starlette, path: str, body: bytes) -> tuple[float, httpx2.Response]:
    """The most CPU time of the loop's thread in about a millisecond of this request, and its answer."""

    async def run() -> tuple[float, httpx2.Response]:
        longest = 0.0
        transport = httpx2.ASGITransport(BodyMiddleware(app, ApiLimits().body))
        async with httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=120) as http:
            asking = asyncio.create_task(http.post(path, content=body))
            while not asking.done():
                before = time.thread_time()
                await asyncio.sleep(0.001)
                longest = max(longest, time.thread_time() - before)
            return longest, await asking

    return asyncio.run(run())


LOGPROBS = {"logprobs": True, "top_logprobs": 20, "n": 8, "max_tokens": 250, "ignore_eos": True}
REQUESTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "log-probabilities of many tokens": ("/chat/completions", {"messages": USER, **LOGPROBS}, 200),
    "log-probabilities of a completion": (
        "/completions", {"prompt": "x", "logprobs": 20, "n": 8, "max_tokens": 250, "ignore_eos": True}, 200,
    ),
    "many messages": ("/chat/completions", {"messages": [*ROUND * 20_000, *USER]}, 400),
    "many messages without text": ("/chat/completions", {"messages": [{"role": "user", "content": ""}] * 40_000}, 400),
    "many items": ("/responses", {"input": USER * 20_000}, 400),
    "counted messages": ("/chat/completions/input_tokens", {"messages": [*ROUND * 5_000, *USER]}, 200),
    "tokenized messages": ("/tokenize", {"messages": [*ROUND * 5_000, *USER]}, 200),
    "many prompts": ("/completions", {"prompt": ["hello world " * 20] * 128, "max_tokens": 1}, 200),
    "empty messages": ("/chat/completions", {"messages": [{}] * 120_000}, 400),
    "empty objects": ("/chat/completions", {"messages": USER, "metadata": {"a": [{}] * 1_000_000}}, 400),
    "wrong numbers": ("/detokenize", {"tokens": [1.5] * 400_000}, 400),
    "many token ids": ("/detokenize", {"tokens": [300] * 400_000}, 200),
    "a long text": ("/tokenize", {"prompt": "hello world 你好 " * 50_000, "return_token_strs": True}, 200),
}  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "status"), REQUESTS.values(), ids=REQUESTS.keys())
def test_a_costly_request_does_not_hold_the_event_loop(
    roomy: Starlette, path: str, fields: dict[str, Any], status: int
) -> None:
    longest, response = longest_turn(roomy, path, json.dumps({"model": NAME, **fields}).encode())
    assert response.status_code == status, response.text[:300]
    assert longest < MAX_TURN_SECONDS


def test_slices_of_json_are_small_and_add_up() -> None:
    top = [{"token": "\u2028", "logprob": -1.5, "bytes": [1, 2]}] * 20
    tokens = [{"token": "x", "logprob": -0.5, "bytes": [3], "top_logprobs": top}] * 200
    choices = [{"index": 0, "logprobs": {"content": tokens, "refusal": None}, "message": {}}] * 3
    completion = {"id": "x", "choices": choices, "usage": {"a": [], "b": {}}, "ids": list(range(50)), "none": []}
    vectors = {"data": [{"index": 0, "embedding": [0.5] * 100}] * 9}
    for value in (completion, vectors, {}, [], "x", [[]], [{}], {"a": {}}):
        slices = list(to_json_slices(value))
        assert "".join(slices) == to_json(value)
        assert max(map(len, slices)) < 2000
