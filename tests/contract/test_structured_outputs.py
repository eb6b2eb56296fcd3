"""Structured outputs and tool calls over HTTP. The model has random weights: only masks can make its answers valid."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx2
import jsonschema
import openai
import pytest
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI
from openai.types.chat import ParsedChatCompletion
from pydantic import BaseModel, Field
from starlette.applications import Starlette

from tests.contract.tiny import NAME, USER, assert_openai_error, chunks, post, sdk, serving

CONTEXT = 4096
ASK: dict[str, Any] = {"model": NAME, "messages": USER, "max_tokens": 400, "seed": 5}


class Weather(BaseModel):
    """The response format of a client."""

    place: Literal["北京", "上海"]
    degrees: Annotated[int, Field(ge=-40, le=50)]
    hours: Annotated[list[Literal["sun", "rain"]], Field(max_length=3)]


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["北京", "x"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "天气", "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "parameters": NOTHING, "strict": True}},
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def app(folder: Path) -> Iterator[Starlette]:
    """ChatGLM2, which was never trained to call tools."""
    with serving(folder, context=CONTEXT) as application:
        yield application


@pytest.fixture(scope="module", params=["chatglm2", "chatglm3"])
def either(request: pytest.FixtureRequest, folder: Path) -> Iterator[Starlette]:
    with serving(folder, request.param, context=CONTEXT) as application:
        yield application


def answer(app: Starlette, **fields: Any) -> dict[str, Any]:
    """The first choice of an answer."""
    response = post(app, "/chat/completions", {**ASK, **fields})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def streamed(app: Starlette, **fields: Any) -> list[dict[str, Any]]:
    """The deltas of an answer."""
    parts = chunks(post(app, "/chat/completions", {**ASK, **fields, "stream": True}))
    return [part["choices"][0] for part in parts if part["choices"]]


def json_schema(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


def test_parse_gives_a_pydantic_object(app: Starlette) -> None:
    async def ask(client: AsyncOpenAI) -> list[ParsedChatCompletion[Weather]]:
        return [
            await client.chat.completions.parse(**{**ASK, "seed": seed}, response_format=Weather) for seed in range(5)
        ]

    for completion in sdk(app, ask):
        assert isinstance(completion.choices[0].message.parsed, Weather)
        assert completion.choices[0].finish_reason == "stop"


def test_several_answers_are_each_held_to_the_schema_and_streams_say_the_same(app: Starlette) -> None:
    fields = {"response_format": json_schema(CITY, strict=True), "n": 4}
    whole = post(app, "/chat/completions", {**ASK, **fields}).json()["choices"]
    parts = chunks(post(app, "/chat/completions", {**ASK, **fields, "stream": True}))
    assert len(whole) == 4
    for choice in whole:
        jsonschema.validate(json.loads(choice["message"]["content"]), CITY)
        own = [part["choices"][0]["delta"] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(delta.get("content", "") for delta in own) == choice["message"]["content"]


def test_json_object_is_an_object_or_reports_its_length(app: Starlette) -> None:
    bias = {str(post(app, "/tokenize", {"model": NAME, "prompt": mark}).json()["tokens"][-1]): 8 for mark in '"}'}
    reasons = []
    for seed in range(6):
        choice = answer(app, response_format={"type": "json_object"}, seed=seed, logit_bias=bias, max_tokens=60)
        reasons.append(choice["finish_reason"])
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
    assert "stop" in reasons


def test_an_answer_cut_by_its_length_says_so(app: Starlette) -> None:
    assert answer(app, response_format=json_schema(CITY), max_tokens=3)["finish_reason"] == "length"

    async def ask(client: AsyncOpenAI) -> None:
        await client.chat.completions.parse(**{**ASK, "max_tokens": 3}, response_format=Weather)

    with pytest.raises(openai.LengthFinishReasonError):
        sdk(app, ask)


def test_guided_answers_are_exactly_what_was_asked_for(app: Starlette) -> None:
    for seed in range(5):
        assert answer(app, guided_choice=["是", "不是"], seed=seed)["message"]["content"] in ("是", "不是")
        assert len(answer(app, guided_regex=r"[0-9]{3}-[0-9]{2}", seed=seed)["message"]["content"]) == 6
        for given in (CITY, json.dumps(CITY)):
            jsonschema.validate(json.loads(answer(app, guided_json=given, seed=seed)["message"]["content"]), CITY)
    assert answer(app, guided_choice=["[[训练时间]]"])["message"]["content"] == "[[训练时间]]"
    assert answer(app, guided_choice=[" x "])["message"]["content"] == " x "


def test_logprobs_stay_those_of_the_model(app: Starlette) -> None:
    fields = {"guided_choice": ["你好"], "logprobs": True, "top_logprobs": 1}
    (first, *_) = answer(app, **fields)["logprobs"]["content"]
    assert first["logprob"] < first["top_logprobs"][0]["logprob"]


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_required_call_is_made_and_fits_its_schema(either: Starlette, choice: Any) -> None:
    for seed in range(2):
        fields = {"tools": TOOLS, "tool_choice": choice, "seed": seed, "parallel_tool_calls": False}
        made = answer(either, **fields)
        reason = "stop" if choice == NAMED else "tool_calls"  # as at OpenAI, where the client chose the function
        assert made["finish_reason"] == reason
        assert made["message"]["content"] is None
        (call,) = made["message"]["tool_calls"]
        schema = CITY if call["function"]["name"] == "get_weather" else NOTHING
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
        if choice == NAMED:
            assert call["function"]["name"] == "get_weather"
        parts = streamed(either, **fields)
        check_call_deltas(parts, call, reason)


def check_call_deltas(parts: list[dict[str, Any]], call: dict[str, Any], reason: str = "tool_calls") -> None:
    """The order that clients were seen to read: role with null, id and name once, fragments, an empty delta."""
    assert parts[0]["delta"] == {"role": "assistant", "content": None}
    begun = parts[1]["delta"]["tool_calls"][0]
    assert begun.keys() == {"index", "id", "type", "function"}
    assert begun["function"] == {"name": call["function"]["name"], "arguments": ""}
    fragments = [part["delta"]["tool_calls"][0] for part in parts[2:-1]]
    assert all(fragment.keys() == {"index", "function"} for fragment in fragments)
    assert "".join(fragment["function"]["arguments"] for fragment in fragments) == call["function"]["arguments"]
    assert len(fragments) > 1 or len(call["function"]["arguments"]) < 5
    assert (parts[-1]["delta"], parts[-1]["finish_reason"]) == ({}, reason)


def test_several_calls_come_with_indices_of_their_own(either: Starlette) -> None:
    counts: list[int] = []
    for seed in range(3):
        fields = {
            "tools": TOOLS[:1],
            "tool_choice": "required",
            "seed": seed,
            "max_tokens": 1500,
            "logit_bias": {"2": -1},
        }
        made = answer(either, **fields)
        counts.append(len(made["message"]["tool_calls"]))
        assert len({call["id"] for call in made["message"]["tool_calls"]}) == counts[-1]
        seen = [c for part in streamed(either, **fields) for c in part["delta"].get("tool_calls", []) if "id" in c]
        assert [call["index"] for call in seen] == list(range(counts[-1]))
    assert max(counts) > 1


def test_the_sdks_stream_helper_reads_calls(either: Starlette) -> None:
    tools = [openai.pydantic_function_tool(Weather)]

    async def ask(client: AsyncOpenAI) -> Any:
        async with client.chat.completions.stream(
            **ASK, tools=tools, tool_choice="required", parallel_tool_calls=False
        ) as stream:
            async for _ in stream:
                pass
            return await stream.get_final_completion()

    (call,) = sdk(either, ask).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)


@pytest.mark.parametrize(
    ("family", "begun"), [("chatglm2", "So: <tool_call>"), ("chatglm3", "get_weather\n"), ("chatglm2", "<tool_call>")]
)
def test_a_call_that_the_model_begins_is_completed_by_the_mask(folder: Path, family: str, begun: str) -> None:
    for stream in (False, True):
        with serving(folder, family, context=CONTEXT, script=begun) as application:
            if stream:
                parts = streamed(application, tools=TOOLS[:1], parallel_tool_calls=False)
                text = "".join(part["delta"].get("content") or "" for part in parts)
                calls = [call for part in parts for call in part["delta"].get("tool_calls", [])]
                arguments = "".join(call["function"]["arguments"] for call in calls)
                reason = parts[-1]["finish_reason"]
            else:
                made = answer(application, tools=TOOLS[:1], parallel_tool_calls=False)
                text, reason = made["message"]["content"] or "", made["finish_reason"]
                (call,) = made["message"]["tool_calls"]
                arguments = call["function"]["arguments"]
        assert reason == "tool_calls"
        assert text == ("So:" if begun.startswith("So") else "")
        jsonschema.validate(json.loads(arguments), CITY)


def test_a_model_that_calls_nothing_just_answers(either: Starlette) -> None:
    for choice in ("auto", "none"):
        made = answer(either, tools=TOOLS, tool_choice=choice, max_tokens=20)
        assert made["message"]["content"]
        assert "tool_calls" not in made["message"]


def test_optional_tools_may_have_schemas_that_cannot_be_compiled(either: Starlette) -> None:
    odd = {
        "type": "function",
        "function": {"name": "odd", "parameters": {"type": "object", "properties": {"a": {"pattern": "a(?=b)"}}}},
    }
    assert answer(either, tools=[odd], max_tokens=5)["message"]["role"] == "assistant"
    for required in (
        {"tool_choice": "required"},
        {"tools": [{**odd, "function": {**odd["function"], "strict": True}}]},
    ):
        error = assert_openai_error(post(either, "/chat/completions", {**ASK, "tools": [odd], **required}), 400)
        assert error["param"] == "tools"
        assert "'odd'" in error["message"]


def test_a_response_format_and_tools_give_a_document_or_calls(either: Starlette) -> None:
    kinds = set[str]()
    for begun in ("<g", "{"):
        ids = [post(either, "/tokenize", {"model": NAME, "prompt": mark}).json()["tokens"][-1] for mark in begun]
        bias = {str(token_id): 100 for token_id in ids}
        fields = {"response_format": json_schema(CITY), "logit_bias": bias, "parallel_tool_calls": False}
        made = answer(either, tools=TOOLS[:1], **fields)
        if made["finish_reason"] == "tool_calls":
            kinds.add("call")
            jsonschema.validate(json.loads(made["message"]["tool_calls"][0]["function"]["arguments"]), CITY)
        else:
            kinds.add("text")
            jsonschema.validate(json.loads(made["message"]["content"]), CITY)
    assert kinds == {"call", "text"}


def test_results_of_tools_continue_the_conversation(either: Starlette) -> None:
    made = answer(either, tools=TOOLS, tool_choice=NAMED)["message"]
    result = {"role": "tool", "tool_call_id": made["tool_calls"][0]["id"], "content": "sunny"}
    history = [*USER, made, result]
    assert answer(either, messages=history, tools=TOOLS, max_tokens=5)["message"]["role"] == "assistant"
    longer = [*history, {"role": "assistant", "content": "Sunny."}, *USER]
    assert answer(either, messages=longer, max_tokens=5)["message"]["role"] == "assistant"


def test_legacy_functions_speak_the_legacy_shape(either: Starlette) -> None:
    functions = [tool["function"] for tool in TOOLS]
    fields = {"functions": functions, "function_call": {"name": "get_weather"}}
    made = answer(either, **fields)
    assert made["finish_reason"] == "stop"  # the client chose it
    assert "tool_calls" not in made["message"]
    call = made["message"]["function_call"]
    assert call["name"] == "get_weather"
    jsonschema.validate(json.loads(call["arguments"]), CITY)
    parts = [part["delta"]["function_call"] for part in streamed(either, **fields) if "function_call" in part["delta"]]
    assert parts[0] == {"name": "get_weather", "arguments": ""}
    assert "".join(part["arguments"] for part in parts) == call["arguments"]
    history = [*USER, made["message"], {"role": "function", "name": "get_weather", "content": "sunny"}]
    assert answer(either, messages=history, functions=functions, max_tokens=5)["message"]["role"] == "assistant"


def test_langchain_gets_objects_and_calls(either: Starlette) -> None:
    async def main() -> None:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(either)) as http:
            chat = ChatOpenAI(
                model=NAME, base_url="http://test", api_key="none", http_async_client=http, max_retries=0,
                max_tokens=2000, seed=3,
            )  # fmt: skip
            for method in ("json_schema", "function_calling"):
                got = await chat.with_structured_output(Weather, method=method).ainvoke("weather?")
                assert isinstance(got, Weather)
            bound = chat.bind_tools([Weather], tool_choice="any", parallel_tool_calls=False)
            (call,) = (await bound.ainvoke("weather?")).tool_calls
            assert Weather.model_validate(call["args"])
            streamed_call = None
            async for chunk in bound.astream("weather?"):
                streamed_call = chunk if streamed_call is None else streamed_call + chunk
            assert streamed_call is not None
            assert Weather.model_validate(streamed_call.tool_calls[0]["args"])

    asyncio.run(main())


def test_answers_without_a_mask_are_the_same_beside_answers_with_one(either: Starlette) -> None:
    plain = {**ASK, "max_tokens": 40, "temperature": 1.2}
    masked = {**ASK, "response_format": json_schema(CITY), "max_tokens": 200}
    alone = [post(either, "/chat/completions", {**plain, "seed": s}).json()["choices"] for s in range(4)]
    masked_alone = [post(either, "/chat/completions", {**masked, "seed": s}).json()["choices"] for s in range(4)]

    async def together() -> tuple[list[Any], list[Any]]:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(either), base_url="http://test") as http:
            bodies = [{**body, "seed": s} for body in (plain, masked) for s in range(4)]
            replies = await asyncio.gather(*(http.post("/chat/completions", json=body) for body in bodies))
            choices = [reply.json()["choices"] for reply in replies]
            return choices[:4], choices[4:]

    assert asyncio.run(together()) == (alone, masked_alone)


TOOL_MESSAGE = {"role": "tool", "tool_call_id": "c1", "content": "x"}
CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}}, "response_format.json_schema"),
    ({"response_format": json_schema(CITY, name="a b")}, "response_format.json_schema.name"),
    ({"response_format": json_schema({"type": "object"}, strict=True)}, "response_format"),
    ({"response_format": json_schema({"not": {"pattern": "a"}})}, "response_format"),
    ({"guided_json": "[1]"}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": 3}, "guided_json"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
    ({"guided_choice": ["a"], "tools": TOOLS}, "guided_choice"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ({"tools": TOOLS, "min_tokens": 3}, "min_tokens"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": 3}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "unknown"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 1}, "strict": True}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
    ({"functions": [TOOLS[0]["function"]], "tools": TOOLS}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"functions": [TOOLS[0]["function"]], "function_call": {"name": "unknown"}}, "function_call"),
    ({"messages": [*USER, TOOL_MESSAGE]}, "messages[1].role"),
    ({"messages": [*USER, CALLED, *USER]}, "messages[1].role"),
    ({"messages": [*USER, CALLED, {**TOOL_MESSAGE, "tool_call_id": "c2"}]}, "messages[2].role"),
    ({"messages": [*USER, CALLED]}, "messages[1].role"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[f"{param} {n}" for n, (_, param) in enumerate(WRONG)])
def test_what_cannot_be_meant_is_refused_by_field(app: Starlette, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        response = post(app, "/chat/completions", {**ASK, **fields, "stream": stream})
        assert assert_openai_error(response, 400)["param"] == param


def test_compiling_does_not_block_other_requests(app: Starlette) -> None:
    """Schemas that are expensive to refuse are sent while another request runs."""
    expensive = json_schema(
        {"allOf": [{"anyOf": [{"type": "object", "required": [f"a{i}{j}"]} for j in range(6)]} for i in range(8)]}
    )

    async def main() -> None:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as http:
            refused = [
                asyncio.create_task(http.post("/chat/completions", json={**ASK, "response_format": expensive}))
                for _ in range(3)
            ]
            begun = time.thread_time(), time.process_time()
            await asyncio.gather(*refused)
            of_this_thread, of_all = time.thread_time() - begun[0], time.process_time() - begun[1]
            assert of_this_thread < 0.5 * of_all  # nearly all of the work is done beside the event loop
            assert {task.result().status_code for task in refused} == {400}
            assert (await http.post("/chat/completions", json={**ASK, "max_tokens": 3})).status_code == 200

    asyncio.run(main())
