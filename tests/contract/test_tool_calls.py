"""Which tool calls a response may hold: repeated calls, tools without parameters, tools that cannot be called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from tests.contract.test_structured_outputs import ASK, CONTEXT, NAMED, TOOLS, answer, either
from tests.contract.tiny import assert_openai_error, post, serving

__all__ = ["either"]


def test_a_call_that_the_model_repeats_ends_the_answer(folder: Path) -> None:
    once = '<tool_call>{"name": "get_weather", "arguments": {"city": "x","days":1}}</tool_call>'
    for fields in ({"tool_choice": "required"}, {"tool_choice": "auto"}):
        with serving(folder, context=CONTEXT, script="\n".join([once] * 3)) as application:
            made = answer(application, tools=TOOLS, **fields)
        assert made["finish_reason"] == "tool_calls"
        (call,) = made["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "x", "days": 1}


@pytest.mark.parametrize("function", [{"name": "f"}, {"name": "f", "parameters": {}}, {"name": "f", "strict": True}])
def test_no_parameters_mean_an_empty_object(either: Starlette, function: dict[str, Any]) -> None:
    for seed in range(3):
        tools = [{"type": "function", "function": function}]
        made = answer(either, tools=tools, tool_choice="required", parallel_tool_calls=False, seed=seed)
        assert made["message"]["tool_calls"][0]["function"]["arguments"] == "{}"
        assert made["finish_reason"] == "tool_calls"


def test_only_tools_that_can_be_called_are_enforced(either: Starlette) -> None:
    odd = {"name": "odd", "strict": True, "parameters": {"type": "object", "properties": {"a": {"pattern": "a(?=b)"}}}}
    tools = [*TOOLS, {"type": "function", "function": odd}]
    for choice in (NAMED, {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}):
        made = answer(either, tools=tools, tool_choice=choice, parallel_tool_calls=False)
        assert [call["function"]["name"] for call in made["message"]["tool_calls"]] == ["get_weather"]
    error = assert_openai_error(post(either, "/chat/completions", {**ASK, "tools": tools}), 400)
    assert "'odd'" in error["message"]
