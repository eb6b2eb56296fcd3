"""Tools of the type `custom`, whose input is text and no JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion
from starlette.applications import Starlette

from serving.generation.tools.custom import CustomInput, to_arguments
from tests.contract.test_openapi import check
from tests.contract.test_structured_outputs import ASK, TOOLS, answer, either
from tests.contract.tiny import NAME, assert_openai_error, chunks, post, sdk

__all__ = ["either"]

SHELL: dict[str, Any] = {"type": "custom", "custom": {"name": "shell", "description": "Runs a command"}}
DIGITS: dict[str, Any] = {
    "type": "custom",
    "custom": {
        "name": "dial",
        "format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[0-9]{3,5}|none"}},
    },
}
ONE: dict[str, Any] = {"tool_choice": {"type": "custom", "custom": {"name": "dial"}}, "parallel_tool_calls": False}


def test_an_input_matches_its_pattern_streaming_or_not(either: Starlette) -> None:
    for seed in range(4):
        made = answer(either, tools=[DIGITS, *TOOLS], **ONE, seed=seed)
        (call,) = made["message"]["tool_calls"]
        assert call == {
            "id": call["id"],
            "type": "custom",
            "custom": {"name": "dial", "input": call["custom"]["input"]},
        }
        assert re.fullmatch("[0-9]{3,5}|none", call["custom"]["input"])
        body = {**ASK, "tools": [DIGITS, *TOOLS], **ONE, "seed": seed, "stream": True}
        stream = chunks(post(either, "/chat/completions", body))
        for chunk in stream:
            check(chunk, "ChatCompletionChunk")
        deltas = [entry for chunk in stream for entry in chunk["choices"][0]["delta"].get("tool_calls", ())]
        assert (deltas[0]["type"], deltas[0]["custom"]["name"]) == ("custom", "dial")
        assert "".join(entry["custom"]["input"] for entry in deltas) == call["custom"]["input"]


def test_the_sdk_reads_a_call_and_sends_it_back(either: Starlette) -> None:
    async def ask(client: AsyncOpenAI) -> tuple[ChatCompletion, ChatCompletion]:
        fields: dict[str, Any] = {**ASK, "tools": [SHELL], "max_tokens": 60}
        first = await client.chat.completions.create(**fields, tool_choice="required", parallel_tool_calls=False)
        (call,) = first.choices[0].message.tool_calls or ()
        turns = [first.choices[0].message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "done"}]
        return first, await client.chat.completions.create(**{**fields, "messages": [*ASK["messages"], *turns]})

    first, second = sdk(either, ask)
    (call,) = first.choices[0].message.tool_calls or ()
    assert call.type == "custom"
    assert call.custom.name == "shell"
    assert second.choices


def of_format(**written: Any) -> dict[str, Any]:
    return {"tools": [{"type": "custom", "custom": {"name": "a", "format": {"type": "grammar", **written}}}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom"}]}, "tools[0].custom"),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].function"),
        ({"tools": [{**SHELL, "function": {"name": "f"}}]}, "tools[0].function"),
        (of_format(), "tools[0].custom.format.grammar"),
        (
            of_format(grammar={"syntax": "lark", "definition": "start: /a/"}),
            "tools[0].custom.format.grammar.syntax",
        ),
        (of_format(grammar={"syntax": "regex", "definition": "(a"}), "tools"),
        ({"tools": [SHELL, SHELL]}, "tools"),
        ({"tools": [SHELL], "tool_choice": {"type": "custom", "custom": {"name": "other"}}}, "tool_choice"),
        ({"tools": [SHELL], "tool_choice": {"type": "custom"}}, "tool_choice.custom"),
    ],
)
def test_wrong_custom_tools_are_named(either: Starlette, fields: dict[str, Any], param: str) -> None:
    error = assert_openai_error(post(either, "/chat/completions", {**ASK, **fields}), 400)
    assert error["param"] == param, error


def test_responses_have_items_for_them(either: Starlette) -> None:
    pattern = {"type": "grammar", "syntax": "regex", "definition": "[0-9]{4}"}
    dial = {"type": "custom", "name": "dial", "format": pattern}
    body: dict[str, Any] = {
        **{"model": NAME, "input": "Hello", "max_output_tokens": 60, "seed": 3, "tools": [dial]},
        **{"tool_choice": {"type": "custom", "name": "dial"}, "parallel_tool_calls": False},
    }
    whole = post(either, "/responses", body).json()
    check(whole, "Response")
    (call,) = whole["output"]
    assert (call["type"], call["name"]) == ("custom_tool_call", "dial")
    assert re.fullmatch("[0-9]{4}", call["input"])
    told = post(either, "/responses", {**body, "stream": True}).text.strip().split("\n\n")
    events = [json.loads(block.partition("data: ")[2]) for block in told]
    for event in events:
        check(event, "ResponseEvent")
    pieces = [e["delta"] for e in events if e["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(pieces) == call["input"]
    result = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "busy"}
    turns = [{"role": "user", "content": "Hello"}, call, result]
    again = post(either, "/responses", {**body, "input": turns, "tool_choice": "auto"})
    assert again.status_code == 200, again.text
    lark = {**dial, "format": {**pattern, "syntax": "lark"}}
    error = assert_openai_error(post(either, "/responses", {**body, "tools": [lark]}), 400)
    assert error["param"] == "tools[0].format.syntax"


@given(st.text(max_size=30), st.lists(st.integers(1, 7), max_size=30), st.booleans())
def test_an_input_is_read_however_its_json_is_cut(text: str, sizes: list[int], is_ascii: bool) -> None:
    rest = json.dumps({"input": text}) if is_ascii else to_arguments(text)
    read, found = CustomInput(), []
    for size in sizes:
        found.append(read.push(rest[:size]))
        rest = rest[size:]
    assert "".join([*found, read.push(rest)]) == text
