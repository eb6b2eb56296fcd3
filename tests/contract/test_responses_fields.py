"""Fields of /v1/responses: those of the response, and those that its errors name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.responses import Response
from pydantic import BaseModel
from starlette.applications import Starlette

from tests.contract.tiny import NAME, assert_openai_error, post

ASK: dict[str, Any] = {"model": NAME, "input": "你好 hello", "max_output_tokens": 12}

# Open Responses, the published specification of this endpoint for other servers, requires these of every response
REQUIRED = {
    *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id"),
    *("instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p"),
    *("presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "usage", "store"),
    *("max_output_tokens", "max_tool_calls", "background", "service_tier", "metadata", "safety_identifier"),
    "prompt_cache_key",
}
# what OpenAI's own objects have beside these, and why it is missing here: all of it is optional
NOT_HERE = {
    "access_programs": "refused in requests",
    "conversation": "nothing is stored",
    "image": "no image output",
    "input_transformations": "the input is never changed",
    "moderation": "answers are not moderated",
    "prompt": "no stored templates",
    "prompt_cache_diagnostics": "`usage` has the cached tokens",
    "prompt_cache_options": "without effect",
    "prompt_cache_retention": "without effect",
    "tool_usage": "no built-in tools",
    "phase": "one message is the whole answer",
    "async_": "no tools that run by themselves",
    "caller": "the model itself calls",
    "namespace": "functions have no namespaces",
    "context": "there is no reasoning",
    "generate_summary": "there is no reasoning",
    "mode": "there is no reasoning",
    "verbosity": "comes back if it was sent",
    "cache_write_tokens_details": "nothing is billed",
    "allowed_callers": "the model itself calls",
    "defer_loading": "all tools are offered",
    "output_schema": "not sent to the model",
}


def test_a_response_has_every_field_that_openai_and_open_responses_have(app: Starlette) -> None:
    tool = {"type": "function", "name": "f"}
    asked = {**ASK, "presence_penalty": 0.5, "frequency_penalty": -1, "tools": [tool], "tool_choice": "none"}
    got = post(app, "/responses", {**asked, "include": ["message.output_text.logprobs"], "top_logprobs": 1}).json()
    assert (got["presence_penalty"], got["frequency_penalty"]) == (0.5, -1)
    assert got.keys() >= REQUIRED
    missing = dict(_missing(got, Response.model_validate(got)))
    assert missing.keys() <= NOT_HERE.keys()
    assert not any(is_required for is_required in missing.values())
    default = post(app, "/responses", ASK).json()
    assert (default["presence_penalty"], default["frequency_penalty"]) == (0, 0)


def _missing(ours: Any, theirs: Any) -> Iterator[tuple[str, bool]]:
    """(field, whether it is required) of OpenAI's type, for those that the value lacks, recursively."""
    if isinstance(theirs, list):
        for our_item, their_item in zip(ours, theirs, strict=True):
            yield from _missing(our_item, their_item)
    elif isinstance(theirs, BaseModel):
        for name, field in type(theirs).model_fields.items():
            key = field.alias or name
            if key not in ours:
                yield name, field.is_required()
            else:
                yield from _missing(ours[key], getattr(theirs, name))


CALL_ITEM = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
OUTPUT_ITEM = {"type": "function_call_output", "call_id": "c1", "output": "x"}
HI, HO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


@pytest.mark.parametrize(
    "change",
    [
        {"input": [HI, HI], "instructions": "Be."},
        {"input": [HO, HI]},
        {"input": [{"role": "system", "content": "a"}, HI], "instructions": "b"},
        {"input": [HI, CALL_ITEM, OUTPUT_ITEM, HO, HO, HI]},
    ],
)
def test_items_may_follow_each_other_in_any_order(app: Starlette, change: dict[str, Any]) -> None:
    reply = post(app, "/responses", {**ASK, "max_output_tokens": 2, **change})
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"input": [HI, HO]}, "input", "The last message must have the role user"),
        ({"input": [HI, OUTPUT_ITEM]}, "input[1]", "No tool call found for function call output with call_id c1."),
        ({"input": [HI, CALL_ITEM]}, "input[1]", "No tool output found for function call c1."),
        ({"input": [HI, CALL_ITEM, HI]}, "input[1]", "No tool output found for function call c1."),
        ({"input": "hello " * 4000}, "input", "Please reduce the length of the input or"),
        ({"input": "hello " * 90, "max_output_tokens": 250}, "input", "Please reduce the length of the input or"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "input[0]"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "x"}}}}, "text.format", "'n'"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "text.format.schema"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "tools[0].name"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "'tools'"),
        ({"min_tokens": 9, "max_output_tokens": 2}, "min_tokens", "'max_output_tokens'"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "logit_bias"),
    ],
)
def test_errors_name_the_fields_of_this_endpoint(
    app: Starlette, change: dict[str, Any], param: str, words: str
) -> None:
    response = post(app, "/responses", {**ASK, **change})
    error = assert_openai_error(response, 400)
    assert error["param"] == param
    assert words in error["message"]
    for name in ("messages", "response_format", "max_tokens", "max_completion_tokens", "function.name"):
        assert name not in error["message"]
    counted = post(app, "/responses/input_tokens", {**ASK, **change})
    assert "messages" not in counted.text
