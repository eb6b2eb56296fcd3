"""The chat endpoint through the openai SDK, against a real engine with a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.applications import Starlette

from serving.openai.chat.request import ChatRequest, to_chat_job
from serving.openai.completions.request import CompletionRequest, to_completion_jobs
from tests.contract.tiny import CONTEXT, NAME, USER, assert_openai_error, chunks, post, sdk, serving

ASK: dict[str, Any] = {"model": NAME, "messages": USER, "max_tokens": 12, "seed": 5}


@pytest.fixture(scope="module")
def app3(folder: Path) -> Iterator[Starlette]:
    """ChatGLM3's format, which has a syntax for tools."""
    with serving(folder, "chatglm3") as application:
        yield application


def test_the_sdk_reads_an_answer(app: Starlette) -> None:
    async def ask(client: AsyncOpenAI) -> ChatCompletion:
        return await client.chat.completions.create(**ASK)

    answer = sdk(app, ask)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == NAME
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id  # public, as the SDK's own documentation says
    ChatCompletion.model_validate(answer.model_dump(), strict=True)


def test_the_sdk_reads_a_stream_and_its_helper_agrees(app: Starlette) -> None:
    async def whole(client: AsyncOpenAI) -> ChatCompletion:
        return await client.chat.completions.create(**{**ASK, "logprobs": True, "top_logprobs": 2, "n": 3})

    async def streamed(client: AsyncOpenAI) -> ChatCompletion:
        arguments = {**ASK, "logprobs": True, "top_logprobs": 2, "n": 3, "stream_options": {"include_usage": True}}
        async with client.chat.completions.stream(**arguments) as stream:
            async for _ in stream:
                pass
            snapshot: Any = stream.current_completion_snapshot
            return ChatCompletion.model_validate(snapshot.model_dump())

    expected, got = sdk(app, whole), sdk(app, streamed)
    for one, other in zip(expected.choices, got.choices, strict=True):
        assert one.message.content == other.message.content
        assert one.finish_reason == other.finish_reason
        assert one.logprobs
        assert other.logprobs
        assert one.logprobs.content == other.logprobs.content
    assert expected.usage
    assert got.usage
    assert expected.usage.completion_tokens == got.usage.completion_tokens


def test_one_id_and_time_for_all_chunks_and_the_true_reason_at_the_end(app: Starlette) -> None:
    async def ask(client: AsyncOpenAI) -> list[ChatCompletionChunk]:
        return [chunk async for chunk in await client.chat.completions.create(**ASK, stream=True)]

    parts = sdk(app, ask)
    assert len({(part.id, part.created, part.model, part.object) for part in parts}) == 1
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[0].choices[0].delta.content == ""
    assert parts[-1].choices[0].delta.model_dump(exclude_unset=True) == {}
    assert parts[-1].choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("name", [NAME, "chatglm", "gpt-3.5-turbo"])
def test_an_answer_bears_the_name_that_was_asked_for(app: Starlette, name: str) -> None:
    assert post(app, "/chat/completions", {**ASK, "model": name}).json()["model"] == name


def test_temperature_zero_is_greedy_and_the_documented_bounds_are_allowed(app: Starlette) -> None:
    def text(**change: Any) -> str:
        response = post(app, "/chat/completions", {**ASK, **change})
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    assert text(temperature=0, seed=1) == text(temperature=0, seed=2) == text(top_p=0, seed=3) == text(top_k=1, seed=4)
    assert text(temperature=2, top_p=1)
    assert text(seed=-1) == text(seed=-1)


def test_null_means_absent(app: Starlette) -> None:
    optional = ["temperature", "top_p", "n", "stop", "stream", "tools", "tool_choice", "logit_bias", "response_format"]
    nulls = {**dict.fromkeys(optional), "functions": None, "stream_options": None, "metadata": None}
    assert (
        post(app, "/chat/completions", {**ASK, **nulls}).json()["choices"]
        == (post(app, "/chat/completions", ASK).json()["choices"])
    )


def test_fields_without_effect_have_none(app: Starlette) -> None:
    fields = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "verbosity": "low",
        "modalities": ["text"],
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
    }
    same = post(app, "/chat/completions", {**ASK, **fields})
    assert same.status_code == 200, same.text
    assert same.json()["choices"] == post(app, "/chat/completions", ASK).json()["choices"]


def test_lengths_under_every_name_are_lengths_of_the_answer(app: Starlette) -> None:
    for name in ("max_tokens", "max_completion_tokens", "max_length"):
        body = {"model": NAME, "messages": USER, name: 3, "ignore_eos": True}
        answer = post(app, "/chat/completions", body).json()
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["choices"][0]["finish_reason"] == "length"


def test_the_default_length_is_cut_to_the_room_that_is_left(app: Starlette) -> None:
    answer = post(app, "/chat/completions", {"model": NAME, "messages": USER, "ignore_eos": True}).json()
    assert answer["usage"]["total_tokens"] == CONTEXT


def test_a_stop_string_ends_the_answer_and_is_not_in_it(app: Starlette) -> None:
    text = str(post(app, "/chat/completions", ASK).json()["choices"][0]["message"]["content"])
    stop = text[len(text) // 2]
    for stream in (False, True):
        response = post(app, "/chat/completions", {**ASK, "stop": [stop, "never"], "stream": stream})
        if stream:
            shown = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks(response))
            reason = chunks(response)[-1]["choices"][0]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            shown, reason = choice["message"]["content"], choice["finish_reason"]
        assert shown == text[: text.index(stop)].rstrip()
        assert reason == "stop"


def test_logit_bias_forces_a_token(app: Starlette) -> None:
    token = post(app, "/tokenize", {"model": NAME, "prompt": "X"}).json()["tokens"][-1]
    body = {**ASK, "logit_bias": {str(token): 100}, "max_tokens": 4, "temperature": 0}
    assert post(app, "/chat/completions", body).json()["choices"][0]["message"]["content"] == "XXXX"


def test_text_parts_are_lines_of_one_message_and_developer_is_system(app: Starlette) -> None:
    def count(messages: list[dict[str, Any]]) -> int:
        body = {"model": NAME, "messages": messages}
        return int(post(app, "/chat/completions/input_tokens", body).json()["input_tokens"])

    in_parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert count(in_parts) == count([{"role": "user", "content": "a\nb"}])
    assert count([{"role": "developer", "content": "be"}, *USER]) == count([{"role": "system", "content": "be"}, *USER])


def test_an_earlier_answer_can_be_sent_back_as_the_sdk_dumps_it(app: Starlette) -> None:
    async def ask(client: AsyncOpenAI) -> ChatCompletion:
        first = await client.chat.completions.create(**ASK)
        history: list[Any] = [*USER, first.choices[0].message.model_dump(), {"role": "user", "content": "again"}]
        return await client.chat.completions.create(model=NAME, messages=history, max_tokens=2)

    assert sdk(app, ask).choices[0].message.role == "assistant"


def test_counted_tokens_are_the_tokens_of_the_prompt(app: Starlette) -> None:
    counted = post(app, "/chat/completions/input_tokens", ASK).json()
    assert counted["input_tokens"] == post(app, "/chat/completions", ASK).json()["usage"]["prompt_tokens"]


def test_a_conversation_that_the_format_cannot_hold_is_refused_by_field(app: Starlette) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    error = assert_openai_error(post(app, "/chat/completions", {**ASK, "tools": tools}), 400)
    assert error["param"] in ("tools", "messages")
    assert post(app, "/chat/completions", {**ASK, "tools": tools, "tool_choice": "none"}).status_code == 200


def test_a_format_with_tools_is_given_them(app3: Starlette) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}]
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    history = [
        {"role": "user", "content": "how is it"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    with_tools = {**ASK, "messages": history, "tools": tools, "max_tokens": 2}
    answer = post(app3, "/chat/completions", with_tools)
    assert answer.status_code == 200, answer.text
    counted = post(app3, "/chat/completions/input_tokens", with_tools).json()["input_tokens"]
    without = post(app3, "/chat/completions/input_tokens", {**ASK, "messages": history[:1]}).json()["input_tokens"]
    assert counted > without


@pytest.mark.parametrize("arguments", ["", '{"city": "Bei', "[]", "null"])
def test_a_history_whose_call_was_cut_is_answered(app: Starlette, app3: Starlette, arguments: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    history = [
        {"role": "user", "content": "how is it"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    for application in (app, app3):
        answer = post(application, "/chat/completions", {**ASK, "messages": history, "max_tokens": 2})
        assert answer.status_code == 200, answer.text


def test_errors_are_the_sdks_own_classes(app: Starlette) -> None:
    async def unknown(client: AsyncOpenAI) -> None:
        await client.chat.completions.create(**{**ASK, "model": "nobody"})

    with pytest.raises(openai.NotFoundError) as not_found:
        sdk(app, unknown)
    assert not_found.value.code == "model_not_found"

    async def too_long(client: AsyncOpenAI) -> None:
        await client.chat.completions.create(**{**ASK, "max_tokens": 9999})

    with pytest.raises(openai.BadRequestError) as too_large:
        sdk(app, too_long)
    assert (too_large.value.code, too_large.value.param) == ("context_length_exceeded", "messages")
    assert too_large.value.type == "invalid_request_error"


def test_running_usage_reaches_the_total(app: Starlette) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    parts = chunks(post(app, "/chat/completions", {**ASK, "stream": True, "stream_options": options}))
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2
    assert counts[-1] == counts[-2] == post(app, "/chat/completions", ASK).json()["usage"]["completion_tokens"]
    assert json.dumps(parts[1]["choices"][0]["logprobs"]) == "null"


def test_running_usage_needs_no_log_probabilities() -> None:
    """They cost a softmax over the vocabulary for each token; counting tokens does not."""
    running = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    job = to_chat_job(ChatRequest.model_validate({**ASK, **running}))
    assert job.sampling.num_top_logprobs is None
    prompts = {"model": NAME, "prompt": ["a", "b"], **running}
    for text_job in to_completion_jobs(CompletionRequest.model_validate(prompts), max_answers=2):
        assert text_job.sampling.num_top_logprobs is None


def test_an_empty_stop_string_stops_nothing(app: Starlette) -> None:
    """Continue's autocompletion sends one."""
    whole = post(app, "/chat/completions", ASK).json()["choices"][0]["message"]
    for stop in ("", [""], ["", "never"]):
        response = post(app, "/chat/completions", {**ASK, "stop": stop})
        assert response.json()["choices"][0]["message"] == whole
