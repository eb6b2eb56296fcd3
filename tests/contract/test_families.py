"""A tiny model of every family: imported into a Bento store, started, and called with the openai SDK.

What it answers is what an independent reading of the same checkpoint says, token for token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from openai import AsyncOpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.applications import Starlette

from serving.generation.interface import TextDelta
from serving.generation.pipeline import RunningModel
from tests.contract.tiny import NAME, assert_openai_error, in_front_of, post, sdk
from tests.families import FAMILIES, Written
from tests.own_store import imported_and_started

QUESTION = "hello world 你好"
LENGTH = 12
GREEDY: dict[str, Any] = {
    "model": NAME,
    "max_tokens": LENGTH,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}

PLAIN: dict[str, Any] = {"model": NAME, "max_tokens": LENGTH, "seed": 1, "logprobs": 2, "ignore_eos": True}


@dataclass(frozen=True)
class Running:
    """A family's checkpoint, and the application that serves what was imported from it."""

    written: Written
    model: RunningModel
    app: Starlette

    def text(self, token_ids: list[int]) -> str:
        """What a client sees of an answer."""
        reader = self.model.chat_format.parser()
        parts = [*reader.push(self.model.chat_format.decode(token_ids)), *reader.flush()]
        return "".join(part.text for part in parts if isinstance(part, TextDelta))


@pytest.fixture(scope="module", params=FAMILIES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("family")
    written = FAMILIES[request.param](folder / "checkpoint")
    model = imported_and_started(folder / "bentoml", written.family, written.folder, written.options)
    with in_front_of(model) as app:
        yield Running(written, model, app)


def test_the_answer_is_the_one_that_the_checkpoint_stands_for(running: Running) -> None:
    prompt = running.written.chat_ids(QUESTION)
    expected = running.written.greedy(prompt, LENGTH)
    arguments = {**GREEDY, "messages": [{"role": "user", "content": QUESTION}], "logprobs": True}

    async def whole(client: AsyncOpenAI) -> ChatCompletion:
        return await client.chat.completions.create(**arguments)

    async def streamed(client: AsyncOpenAI) -> list[ChatCompletionChunk]:
        return [chunk async for chunk in await client.chat.completions.create(**arguments, stream=True)]

    answer = sdk(running.app, whole)
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), LENGTH)
    choice = answer.choices[0]
    assert choice.logprobs
    spelled = [bytes(token.bytes or []) for token in choice.logprobs.content or []]
    assert len(spelled) == LENGTH
    assert b"".join(spelled) == (choice.message.content or "").encode()
    assert choice.message.content == running.text(expected)
    assert choice.finish_reason == "length"
    parts = [chunk.choices[0] for chunk in sdk(running.app, streamed)]
    assert "".join(part.delta.content or "" for part in parts) == choice.message.content
    assert parts[-1].finish_reason == "length"


def test_a_raw_completion_goes_on_from_the_prompts_own_text(running: Running) -> None:
    """CodeGeeX2's way to be asked: code in, more code out, not a space lost."""
    prompt = running.written.raw_ids("def hello(world):")
    expected = running.written.greedy(prompt, LENGTH)

    async def ask(client: AsyncOpenAI) -> Completion:
        return await client.completions.create(**GREEDY, prompt="def hello(world):")

    answer = sdk(running.app, ask)
    assert answer.usage
    assert answer.usage.prompt_tokens == len(prompt)
    chat_format = running.model.chat_format
    before = [] if running.written.family == "chatglm" else prompt  # there the answer is a text of its own
    together = chat_format.decode([*before, *expected])
    assert answer.choices[0].text == together.removeprefix(chat_format.decode(before))


def test_an_answer_ends_at_the_models_own_end_tokens(running: Running) -> None:
    """A bias makes each of them certain; the answer is empty then, and over."""
    assert running.model.chat_format.stop_token_ids
    for stop_id in running.model.chat_format.stop_token_ids:
        body = {"model": NAME, "messages": [{"role": "user", "content": QUESTION}], "logit_bias": {str(stop_id): 100}}
        choice = post(running.app, "/chat/completions", {**body, "temperature": 0}).json()["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "")


def test_positions_past_the_trained_length_are_refused_with_both_numbers(running: Running) -> None:
    length, prompt = running.model.context_length, running.written.chat_ids(QUESTION)
    assert length == running.model.engine.shape.max_positions
    body: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    room = length - len(prompt)
    full = post(running.app, "/chat/completions", {**body, "max_tokens": room, "ignore_eos": True})
    assert full.json()["usage"]["total_tokens"] == length
    error = assert_openai_error(post(running.app, "/chat/completions", {**body, "max_tokens": room + 1}), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert error["message"].startswith(
        f"This model's maximum context length is {length} tokens. However, you requested {length + 1} tokens "
        f"({len(prompt)} in the messages, {room + 1} in the completion)."
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_an_answer_does_not_depend_on_the_default_type_of_tensors(running: Running, precision: str) -> None:
    """transformers sets it for the whole process while it loads a model, and others answer requests meanwhile."""
    post(running.app, "/completions", {**PLAIN, "prompt": QUESTION})  # from here on the prompt is in the cache
    before = post(running.app, "/completions", {**PLAIN, "prompt": QUESTION}).json()["choices"]
    torch.set_default_dtype(getattr(torch, precision))
    try:
        assert post(running.app, "/completions", {**PLAIN, "prompt": QUESTION}).json()["choices"] == before
        embedded = post(running.app, "/embeddings", {"model": NAME, "input": QUESTION})
    finally:
        torch.set_default_dtype(torch.float32)
    assert embedded.json() == post(running.app, "/embeddings", {"model": NAME, "input": QUESTION}).json()
