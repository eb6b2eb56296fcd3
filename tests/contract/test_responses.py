"""The stateless responses endpoint: through the openai SDK, by hand, and its fold on lists of events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from starlette.applications import Starlette

from serving.generation.interface import ChatEvent, Finished, TextDelta, ToolCallDelta, Usage
from serving.openai.responses.events import ResponseStream, to_response
from serving.openai.responses.request import REFUSED, ResponsesRequest
from serving.openai.responses.response import unfinished_response
from tests.contract.test_streams import FailsAt
from tests.contract.tiny import NAME, assert_openai_error, post, sdk, serving

ASK: dict[str, Any] = {"model": NAME, "input": "你好 hello", "max_output_tokens": 12}
SEED: dict[str, Any] = {"seed": 5, "ignore_eos": True}  # not OpenAI's: the SDK sends them as extra_body
CALL = [ToolCallDelta(0, "call_1", "f", ""), ToolCallDelta(0, None, None, '{"a":'), ToolCallDelta(0, None, None, "1}")]


def events_of(response: Any) -> list[dict[str, Any]]:
    """The events of a stream; every one is named twice, and nothing follows the last."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    output = [{key: value for key, value in item.items() if key != "id"} for item in response["output"]]
    volatile = ("id", "created_at", "completed_at", "usage")
    return {**{key: value for key, value in response.items() if key not in volatile}, "output": output}


def test_the_sdk_reads_a_response(app: Starlette) -> None:
    async def ask(client: AsyncOpenAI) -> Response:
        return await client.responses.create(**ASK, extra_body=SEED)

    response = sdk(app, ask)
    Response.model_validate(response.model_dump(by_alias=True), strict=True)
    assert response.id.startswith("resp_")
    assert response.output_text
    assert response.status == "incomplete"
    assert response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage
    assert response.usage.output_tokens == 12
    assert response.usage.total_tokens == response.usage.input_tokens + 12
    assert response.usage.input_tokens_details.cached_tokens < response.usage.input_tokens


def test_it_says_what_a_chat_completion_says(app: Starlette) -> None:
    chat = {"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "你好"}]}
    expected = post(app, "/chat/completions", {"model": NAME, **chat, "max_tokens": 12, "seed": 5}).json()
    body = {"model": NAME, "instructions": "Be.", "input": "你好", "max_output_tokens": 12, "seed": 5}
    got = post(app, "/responses", body).json()
    assert got["output"][0]["content"][0]["text"] == expected["choices"][0]["message"]["content"]
    assert got["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
    assert got["usage"]["output_tokens"] == expected["usage"]["completion_tokens"]


def test_a_stream_has_openais_events_and_ends_with_the_whole_response(app: Starlette) -> None:
    events = events_of(post(app, "/responses", {**ASK, **SEED, "stream": True}))
    kinds = [event["type"] for event in events]
    num_deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *(["response.output_text.delta"] * num_deltas),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.incomplete",
    ]
    assert num_deltas > 1
    last = events[-1]["response"]
    whole = post(app, "/responses", {**ASK, **SEED}).json()
    assert without_ids(last) == without_ids(whole)
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"] == events[-4]["text"]
    assert {event["response"]["id"] for event in events if "response" in event} == {last["id"]}
    for event in events:
        TypeAdapter[ResponseStreamEvent](ResponseStreamEvent).validate_python(event)


def test_the_sdks_stream_helper_gathers_the_response(app: Starlette) -> None:
    async def ask(client: AsyncOpenAI) -> tuple[str, Response]:
        text = ""
        async with client.responses.stream(model=NAME, input="hello", extra_body={"seed": 1}) as stream:
            async for event in stream:
                if event.type == "response.output_text.delta":
                    text += event.delta
            return text, await stream.get_final_response()

    async def parse(client: AsyncOpenAI) -> Any:
        return await client.responses.parse(model=NAME, input="hello", extra_body={"seed": 1})

    text, final = sdk(app, ask)
    assert final.status == "completed"
    assert final.output_text == text == sdk(app, parse).output_text


def test_logprobs_come_when_they_are_included(app: Starlette) -> None:
    asked = {**ASK, **SEED, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = post(app, "/responses", asked).json()["output"][0]["content"][0]
    assert len(part["logprobs"]) == 12
    assert len(part["logprobs"][0]["top_logprobs"]) == 2
    streamed = events_of(post(app, "/responses", {**asked, "stream": True}))
    told = [entry for e in streamed if e["type"] == "response.output_text.delta" for entry in e["logprobs"]]
    assert [entry["token"] for entry in told] == [entry["token"] for entry in part["logprobs"]]
    assert post(app, "/responses", ASK).json()["output"][0]["content"][0]["logprobs"] == []


def test_the_conversation_goes_on_when_it_is_sent_again(app: Starlette) -> None:
    async def ask(client: AsyncOpenAI) -> tuple[Response, Response]:
        first = await client.responses.create(**ASK, extra_body=SEED)
        history: list[Any] = [{"role": "user", "content": "你好 hello"}, *first.output]
        history.append({"type": "message", "role": "user", "content": [{"type": "input_text", "text": "again"}]})
        return first, await client.responses.create(model=NAME, input=history, max_output_tokens=3)

    first, second = sdk(app, ask)
    assert first.usage
    assert second.usage
    assert second.usage.input_tokens > first.usage.input_tokens


def test_calls_and_their_results_are_messages_of_the_chat(folder: Path) -> None:
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}", "id": "fc_1"}
    items = [
        {"role": "user", "content": "how is it"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}]},
        call,
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
    ]
    chat_call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "how is it"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [chat_call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    function = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
    with serving(folder, "chatglm3") as app3:
        flat = {"model": NAME, "input": items, "tools": [{"type": "function", **function}]}
        nested = {"model": NAME, "messages": messages, "tools": [{"type": "function", "function": function}]}
        counted = post(app3, "/responses/input_tokens", flat).json()
        assert counted == post(app3, "/chat/completions/input_tokens", nested).json()
        answer = post(app3, "/responses", {**flat, "input": "hi", "max_output_tokens": 2})
        assert answer.status_code == 200, answer.text
        assert answer.json()["tools"][0]["name"] == "weather"


@pytest.mark.parametrize("field", REFUSED)
def test_what_would_need_memory_is_refused_with_a_reason(app: Starlette, field: str) -> None:
    error = assert_openai_error(post(app, "/responses", {**ASK, field: "x"}), 400)
    assert (error["param"], error["code"]) == (field, "unsupported_value")
    assert post(app, "/responses", {**ASK, field: None}).status_code == 200


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"store": True}, "store", "unsupported_value"),
        ({"background": True}, "background", "unsupported_value"),
        ({"truncation": "auto"}, "truncation", "unsupported_value"),
        ({"store": 1}, "store", "invalid_type"),
        ({"input": None}, "input", "invalid_type"),
        ({"input": []}, "input", "empty_array"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": [5]}, "input[0]", "invalid_type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "unsupported_value"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "invalid_value"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
            "unsupported_value",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "missing_required_parameter"),
        ({"input": "x " * 500}, "input", "context_length_exceeded"),
        ({"temperature": 3}, "temperature", "decimal_above_max_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
        ({"min_tokens": 13}, "min_tokens", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "invalid_value"),
        ({"text": {"format": {"type": "poem"}}}, "text.format.type", "invalid_value"),
        ({"messages": []}, "messages", "unknown_parameter"),
    ],
)
def test_a_bad_field_is_named(app: Starlette, change: dict[str, Any], param: str, code: str) -> None:
    error = assert_openai_error(post(app, "/responses", {**ASK, **change}), 400)
    assert (error["param"], error["code"]) == (param, code)


def test_what_the_sdk_sends_by_default_is_accepted(app: Starlette) -> None:
    same = {
        "store": False,
        "background": False,
        "truncation": "disabled",
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "metadata": {"a": "b"},
        "user": "u",
    }
    response = post(app, "/responses", {**ASK, **same})
    assert response.status_code == 200, response.text
    assert response.json()["metadata"] == {"a": "b"}
    assert response.json()["store"] is False


def fold(events: list[ChatEvent], **change: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a stream tells of these events, and the whole response of the same."""
    body = ResponsesRequest.model_validate({**ASK, **change})
    streamed = ResponseStream(unfinished_response(body), False, chr_bytes)
    told = [json.loads(item.split("\ndata: ")[1]) for event in events for item in streamed.push(0, event)]
    whole: Any = to_response(
        [(0, event) for event in events], ResponseStream(unfinished_response(body), False, chr_bytes)
    )
    return told, whole


def chr_bytes(token_id: int) -> bytes:
    return chr(token_id).encode()


def test_text_and_calls_are_items_one_after_the_other() -> None:
    second = [ToolCallDelta(1, "call_2", "g", "{"), ToolCallDelta(1, None, None, "}")]
    told, whole = fold([TextDelta("Let me see."), *CALL, *second, Finished("tool_calls", Usage(9, 5, 4))])
    assert without_ids(told[-1]["response"]) == without_ids(whole)
    text, first, other = whole["output"]
    assert text["content"][0]["text"] == "Let me see."
    assert (first["call_id"], first["name"], first["arguments"]) == ("call_1", "f", '{"a":1}')
    assert (other["call_id"], other["name"], other["arguments"]) == ("call_2", "g", "{}")
    assert whole["status"] == "completed"
    assert [e["output_index"] for e in told if e["type"] == "response.output_item.added"] == [0, 1, 2]
    assert [e["output_index"] for e in told if e["type"] == "response.output_item.done"] == [0, 1, 2]
    kinds = [event["type"] for event in told]
    assert kinds.count("response.function_call_arguments.delta") == 4
    assert kinds.index("response.output_text.done") < kinds.index("response.function_call_arguments.delta")
    assert whole["usage"]["input_tokens_details"]["cached_tokens"] == 4
    for event in told:
        TypeAdapter[ResponseStreamEvent](ResponseStreamEvent).validate_python(event)


def test_an_answer_without_a_word_is_an_empty_message() -> None:
    told, whole = fold([Finished("stop", Usage(9, 1))])
    assert whole["output"][0]["content"][0]["text"] == ""
    assert without_ids(told[-1]["response"]) == without_ids(whole)


def test_a_call_that_was_cut_off_says_so() -> None:
    _, whole = fold([*CALL[:2], Finished("length", Usage(9, 5))])
    assert whole["output"][0]["status"] == whole["status"] == "incomplete"


def test_a_fault_before_the_first_token_is_a_500_and_later_an_event(folder: Path) -> None:
    with serving(folder, before=FailsAt(1)) as app:
        assert_openai_error(post(app, "/responses", {**ASK, "stream": True}), 500)
    with serving(folder, before=FailsAt(6)) as app:
        events = events_of(post(app, "/responses", {**ASK, **SEED, "stream": True}))
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["status"] == "failed"
        assert events[-1]["response"]["error"]["code"] == "server_error"
        assert "secret" not in json.dumps(events)


def test_errors_are_the_sdks_own_classes(app: Starlette) -> None:
    async def ask(client: AsyncOpenAI) -> None:
        await client.responses.create(model=NAME, input="x", previous_response_id="resp_1")

    with pytest.raises(openai.BadRequestError, match="not stored"):
        sdk(app, ask)


class Weather(BaseModel):
    """What the model is made to say."""

    city: Literal["Paris", "Rome"]
    warm: bool


def test_the_sdk_parses_a_schema_and_a_forced_call(folder: Path) -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    flat: Any = {"type": "function", "name": "f", "parameters": parameters, "strict": True}

    async def text(client: AsyncOpenAI) -> Any:
        return await client.responses.parse(model=NAME, input="hello", text_format=Weather)

    async def call(client: AsyncOpenAI) -> Any:
        choice: Any = {"type": "function", "name": "f"}
        return await client.responses.parse(
            model=NAME, input="hello", tools=[flat], tool_choice=choice, parallel_tool_calls=False
        )

    async def streamed(client: AsyncOpenAI) -> Any:
        async with client.responses.stream(
            model=NAME, input="hi", tools=[flat], tool_choice="required", parallel_tool_calls=False
        ) as stream:
            kinds = {event.type async for event in stream}
            assert "response.function_call_arguments.delta" in kinds
            return await stream.get_final_response()

    with serving(folder, context=1024) as roomy:
        assert isinstance(sdk(roomy, text).output_parsed, Weather)
        called = [sdk(roomy, call), sdk(roomy, streamed)]
    for response in called:
        assert response.status == "completed"
        (item,) = response.output
        assert item.type == "function_call"
        assert json.loads(item.arguments)["a"] in (True, False)


def test_bad_forms_are_named_as_this_endpoint_names_them(app: Starlette) -> None:
    def error_of(change: dict[str, Any]) -> tuple[Any, Any]:
        error = assert_openai_error(post(app, "/responses", {**ASK, **change}), 400)
        return error["param"], error["code"]

    tool = {"type": "function", "name": "f"}
    assert error_of({"tools": [tool, tool]})[0] == "tools"
    assert error_of({"tools": [tool], "tool_choice": {"type": "function", "name": "g"}})[0] == "tool_choice"
    assert error_of({"text": {"format": {"type": "json_schema", "name": "x"}}})[0] == "text.format.schema"
    unsupported = {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}
    assert error_of({"text": {"format": unsupported}})[0].startswith("text.format")
