"""The bytes of the tokens in `logprobs` are the bytes of the text that they come with, at every endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from tests.contract.tiny import NAME, USER, chunks, post, serving

# at this temperature the tiny model writes random tokens: bytes of broken characters among them
RANDOM: dict[str, Any] = {"model": NAME, "temperature": 2, "top_p": 1}
SEEDS = range(6)


def joined(entries: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(bytes(entry["bytes"]) for entry in entries)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stop", [None, ["o", "\n"]])
def test_chat(app: Starlette, seed: int, stop: list[str] | None) -> None:
    body = {**RANDOM, "messages": USER, "max_tokens": 48, "seed": seed, "logprobs": True, "top_logprobs": 3}
    if stop:
        body["stop"] = stop
    choice = post(app, "/chat/completions", body).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert joined(entries) == choice["message"]["content"].encode()
    for entry in entries:
        assert entry["token"].encode() == bytes(entry["bytes"]) or "\\x" in entry["token"]
        assert len(entry["top_logprobs"]) == 3
    parts = [part["choices"][0] for part in chunks(post(app, "/chat/completions", {**body, "stream": True}))]
    for part in parts:
        shown = part["logprobs"]["content"] if part["logprobs"] else []
        assert joined(shown) == (part["delta"].get("content") or "").encode()
    assert "".join(part["delta"].get("content") or "" for part in parts) == choice["message"]["content"]


@pytest.mark.parametrize("seed", SEEDS)
def test_completions(app: Starlette, seed: int) -> None:
    body = {**RANDOM, "prompt": [65, 66], "max_tokens": 48, "seed": seed, "logprobs": 2}
    choice = post(app, "/completions", body).json()["choices"][0]
    parts = [part["choices"][0] for part in chunks(post(app, "/completions", {**body, "stream": True}))]
    for one in (choice, *parts):
        tokens = one["logprobs"]["tokens"] if one["logprobs"] else []
        assert b"".join(map(own_bytes, tokens)) == one["text"].encode()
        for token, top in zip(tokens, one["logprobs"]["top_logprobs"] if tokens else [], strict=True):
            assert token in top
    offsets = choice["logprobs"]["text_offset"]
    for start, end, token in zip(
        offsets, [*offsets[1:], len(choice["text"])], choice["logprobs"]["tokens"], strict=True
    ):
        assert token.startswith("bytes:") or choice["text"][start:end] == token


def own_bytes(token: str) -> bytes:
    """OpenAI's legacy notation -> bytes."""
    if not token.startswith("bytes:"):
        return token.encode()
    return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))


@pytest.mark.parametrize("seed", SEEDS)
def test_responses(app: Starlette, seed: int) -> None:
    body = {**RANDOM, "input": "hi", "max_output_tokens": 48, "seed": seed, "top_logprobs": 1}
    part = post(app, "/responses", body).json()["output"][0]["content"][0]
    assert joined(part["logprobs"]) == part["text"].encode()
    streamed = post(app, "/responses", {**body, "stream": True}).text.split("\n\n")
    events = [json.loads(event.split("\n")[1].removeprefix("data: ")) for event in streamed if event]
    for event in events:
        if event["type"] == "response.output_text.delta":
            assert joined(event["logprobs"]) == event["delta"].encode()


def test_the_space_in_front_of_an_answer_is_in_no_token(app: Starlette) -> None:
    """The tokenizer writes "Hello" as " Hello", and the answer begins with "Hello"."""
    body = {"model": NAME, "messages": USER, "guided_choice": ["Hello"], "logprobs": True, "top_logprobs": 5}
    choice = post(app, "/chat/completions", body).json()["choices"][0]
    assert choice["message"]["content"] == "Hello"
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == "Hello"


def test_the_tokens_of_a_call_are_not_of_the_content(folder: Path) -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"enum": [1]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = {"model": NAME, "messages": USER, "tools": [tool], "tool_choice": "required", "logprobs": True}
    with serving(folder, context=1024) as app:
        choice = post(app, "/chat/completions", {**body, "parallel_tool_calls": False}).json()["choices"][0]
    assert choice["message"]["content"] is None
    assert choice["logprobs"]["content"] == []
