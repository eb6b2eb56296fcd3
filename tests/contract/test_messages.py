"""Anthropic's Messages API: through the anthropic SDK and by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import anthropic
import httpx2
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import Message, message_create_params
from starlette.applications import Starlette

from serving.generation.interface import ChatEvent, Finished, TextDelta, ToolCallDelta, Usage
from serving.openai.messages.request import ACCEPTED_WITHOUT_EFFECT, REFUSED, MessagesRequest
from serving.openai.messages.response import MessageStream, to_message, unfinished_message
from tests.contract.test_openapi import check
from tests.contract.test_streams import FailsAt
from tests.contract.test_structured_outputs import CONTEXT, either
from tests.contract.tiny import NAME, assert_openai_error, post, send, serving

__all__ = ["either"]

T = TypeVar("T")
ASK: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "你好 hello"}], "max_tokens": 12}
SEED: dict[str, Any] = {"seed": 5, "ignore_eos": True}
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 4}},
        "required": ["city"],
    },
}
USE = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "京"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sunny"}]}


def sdk(app: Starlette, work: Callable[[AsyncAnthropic], Awaitable[T]]) -> T:
    async def run() -> T:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as http:
            return await work(AsyncAnthropic(base_url="http://test", api_key="none", http_client=http, max_retries=0))

    # the SDK's base URL has no /v1: it writes that itself
    return asyncio.run(run())


@pytest.fixture(scope="module")
def mounted(app: Starlette) -> Starlette:
    """Under /v1, as the server mounts it."""
    outer = Starlette()
    outer.mount("/v1", app)
    return outer


def error_of(response: httpx2.Response, status: int) -> dict[str, str]:
    assert response.status_code == status, response.text
    check(response.json(), "MessagesErrorResponse")
    error: dict[str, str] = response.json()["error"]
    return error


def events_of(response: httpx2.Response) -> list[dict[str, Any]]:
    events = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_the_sdk_reads_an_answer_and_a_stream_of_the_same(mounted: Starlette) -> None:
    async def ask(client: AsyncAnthropic) -> tuple[Message, str, Message]:
        whole = await client.messages.create(**ASK, extra_body=SEED)
        async with client.messages.stream(**ASK, extra_body=SEED) as stream:
            pieces = [text async for text in stream.text_stream]
            return whole, "".join(pieces), await stream.get_final_message()

    whole, text, streamed = sdk(mounted, ask)
    assert whole.id.startswith("msg_")
    assert whole.content[0].type == "text"
    assert whole.content[0].text == text
    assert whole.stop_reason == streamed.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 12
    assert [block.to_dict()["text"] for block in streamed.content] == [text]
    assert streamed.usage.output_tokens == 12
    cached = streamed.usage.cache_read_input_tokens or 0
    assert streamed.usage.input_tokens + cached == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


def test_the_answer_is_the_one_that_chat_gives(app: Starlette) -> None:
    chat = {**ASK, "messages": [{"role": "system", "content": "Be brief."}, *ASK["messages"]], **SEED}
    expected = post(app, "/chat/completions", chat).json()["choices"][0]["message"]["content"]
    cached = {"type": "ephemeral", "ttl": "1h"}
    system = [{"type": "text", "text": "Be brief.", "cache_control": cached}]
    content = [{"type": "text", "text": "你好 hello", "cache_control": cached}]
    body = {**ASK, **SEED, "system": system, "messages": [{"role": "user", "content": content}]}
    assert post(app, "/messages", body).json()["content"] == [{"type": "text", "text": expected, "citations": None}]


def test_turns_of_one_role_are_one_turn_and_a_last_answer_is_continued(app: Starlette) -> None:
    two = [{"role": "user", "content": "你好"}, {"role": "user", "content": "hello"}]
    one = [{"role": "user", "content": "你好\nhello"}]
    answers = [post(app, "/messages", {**ASK, **SEED, "messages": turns}).json()["content"] for turns in (two, one)]
    assert answers[0] == answers[1]
    begun = [*one, {"role": "assistant", "content": "He"}]
    chat = {**ASK, **SEED, "messages": begun, "continue_final_message": True}
    expected = post(app, "/chat/completions", chat).json()["choices"][0]["message"]["content"]
    continued = post(app, "/messages", {**ASK, **SEED, "messages": begun}).json()
    assert "".join(block["text"] for block in continued["content"]) == expected


def test_stop_sequences_are_named(app: Starlette) -> None:
    text = post(app, "/messages", {**ASK, **SEED}).json()["content"][0]["text"]
    word = text[2:4]
    stopped = post(app, "/messages", {**ASK, **SEED, "stop_sequences": ["", "never", word]}).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", word)
    assert word not in "".join(block["text"] for block in stopped["content"])


def test_counted_tokens_are_those_of_the_answer(mounted: Starlette) -> None:
    async def ask(client: AsyncAnthropic) -> tuple[int, Message]:
        counted = await client.messages.count_tokens(model=NAME, messages=ASK["messages"], system="Be brief.")
        return counted.input_tokens, await client.messages.create(**ASK, system="Be brief.")

    counted, answer = sdk(mounted, ask)
    assert counted == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_tool_that_has_to_be_called_is(either: Starlette, choice: dict[str, Any]) -> None:
    once = {**choice, "disable_parallel_tool_use": True}
    body = {**ASK, "max_tokens": 100, "tools": [WEATHER], "tool_choice": once, "seed": 3}
    answer = post(either, "/messages", body).json()
    check(answer, "AnthropicMessage")
    (call,) = answer["content"]
    assert (call["type"], call["name"], answer["stop_reason"]) == ("tool_use", "get_weather", "tool_use")
    assert isinstance(call["input"]["city"], str)
    events = events_of(post(either, "/messages", {**body, "stream": True}))
    for event in events:
        check(event, "MessageEvent")
    assert events[1]["content_block"] == {
        "type": "tool_use",
        "id": events[1]["content_block"]["id"],
        "name": "get_weather",
        "input": {},
    }
    pieces = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
    assert json.loads("".join(pieces)) == call["input"]
    # the answer and the tool's result go back
    follow = [
        *ASK["messages"],
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "…", "signature": "s"}, USE]},
        {"role": "user", "content": [RESULT, {"type": "text", "text": "and now?"}]},
    ]
    again = post(either, "/messages", {**body, "messages": follow, "tool_choice": {"type": "auto"}})
    assert again.status_code == 200, again.text


def test_results_and_schemas_reach_the_prompt_and_the_answer(folder: Path) -> None:
    with serving(folder, context=CONTEXT) as app:
        schema = {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "required": ["a"],
            "additionalProperties": False,
        }
        output = {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
        answer = post(app, "/messages", {**ASK, "max_tokens": 60, "output_config": output}).json()
        assert json.loads(answer["content"][0]["text"])["a"] in (True, False)

        def count(result: dict[str, Any]) -> int:
            turns = [*ASK["messages"], {"role": "assistant", "content": [USE]}, {"role": "user", "content": [result]}]
            counted = post(app, "/messages/count_tokens", {"model": NAME, "messages": turns, "tools": [WEATHER]})
            assert counted.status_code == 200, counted.text
            number: int = counted.json()["input_tokens"]
            return number

        plain = count(RESULT)
        assert count({**RESULT, "is_error": True}) > plain
        assert count({**RESULT, "content": "sunny"}) == plain
        assert count({"type": "tool_result", "tool_use_id": "toolu_1"}) < plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "server_tool_use"}]}]}, "server_tool_use"),
        ({"messages": [{"role": "user", "content": [USE]}]}, "belong into messages with the role 'assistant'"),
        ({"messages": [*ASK["messages"], {"role": "assistant", "content": [USE]}]}, "No tool_result block follows"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "has no tool_use block"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "'name' goes with the type 'tool'"),
        ({"tool_choice": {"type": "any"}}, "only allowed when 'tools' are specified"),
        ({"mcp_servers": [{}]}, "MCP"),
        ({"temperature": 3}, "temperature"),
        ({"seeds": 3}, "seeds"),
        ({"system": [{"type": "text"}]}, "system[0].text"),
    ],
)
def test_bad_requests_are_named_in_anthropics_shape(app: Starlette, change: dict[str, Any], message: str) -> None:
    body = {key: value for key, value in {**ASK, **change}.items() if value is not None}
    error = error_of(post(app, "/messages", body), 400)
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


def test_every_field_of_the_sdk_has_a_place() -> None:
    headers = {"user_profile_id", "workspace_id"}
    known = MessagesRequest.model_fields.keys() | REFUSED.keys() | headers
    assert message_create_params.MessageCreateParamsBase.__annotations__.keys() <= known
    assert known >= ACCEPTED_WITHOUT_EFFECT.keys()


def test_a_model_of_the_name_messages_changes_no_shape(app: Starlette) -> None:
    assert_openai_error(send(app, "GET", "/models/messages"), 404)
    error_of(send(app, "GET", "/messages"), 405)


def test_the_sdk_raises_its_own_errors(mounted: Starlette) -> None:
    async def ask(client: AsyncAnthropic) -> None:
        await client.messages.create(**{**ASK, "model": "other"})

    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        sdk(mounted, ask)


def test_a_stream_that_fails_ends_in_an_error_event(folder: Path) -> None:
    with serving(folder, before=FailsAt(4)) as app:
        *_, last = events_of(post(app, "/messages", {**ASK, **SEED, "stream": True}))
    assert last["type"] == "error"
    check(last, "MessagesErrorResponse")


def test_a_cut_call_keeps_its_text_and_cached_tokens_are_counted_apart() -> None:
    events: list[ChatEvent] = [
        TextDelta("Let me see."),
        ToolCallDelta(0, "call_1", "f", ""),
        ToolCallDelta(0, None, None, '{"a": 1'),
        Finished("length", Usage(9, 5, 4)),
    ]
    message = to_message([(0, event) for event in events], MessageStream(unfinished_message("msg_1", NAME, 9)))
    check(message, "AnthropicMessage")
    assert [block["type"] for block in message["content"]] == ["text", "tool_use"]
    assert message["content"][1]["input"] == {"arguments": '{"a": 1'}  # type: ignore[typeddict-item]
    assert message["stop_reason"] == "max_tokens"
    assert (message["usage"]["input_tokens"], message["usage"]["cache_read_input_tokens"]) == (5, 4)
