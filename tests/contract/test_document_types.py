"""The published schemas of request bodies allow what the server takes, and nothing else, as far as types say it."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from serving.openai.openapi import document
from tests.contract.tiny import NAME, post

DOCUMENT = document()
names = st.sampled_from(["f", "get-it_1", "a b", "", "x" * 65, None, 1])
texts = st.sampled_from(["x", "", None, 1])
parts = st.sampled_from(
    [
        {"type": "text", "text": "x"},
        {"type": "text"},
        {"type": "text", "text": None},
        {"type": "refusal", "refusal": "no"},
        {"type": "refusal", "refusal": "no", "text": "x"},
        {"type": "refusal"},
        {"type": "robot", "text": "x"},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "input_text", "text": "x"},
        {"type": "output_text", "text": "x", "annotations": []},
        "x",
        None,
    ]
)
contents = texts | st.lists(parts, max_size=2)
functions = st.sampled_from(
    [{"name": "f", "arguments": ""}, {"name": "f"}, {"arguments": "{}", "name": None}, None, "f"]
)
calls = st.fixed_dictionaries({"id": texts, "type": st.sampled_from(["function", "x"]), "function": functions})
roles = st.sampled_from(["system", "user", "assistant", "tool", "function", "robot", None])
chat_messages = st.fixed_dictionaries(
    {"role": roles},
    optional={
        "content": contents,
        "name": names,
        "tool_calls": st.none() | st.lists(calls, max_size=2),
        "function_call": functions,
        "tool_call_id": texts,
        "refusal": texts,
        "audio": st.none() | st.just({}),
    },
)
definitions = st.fixed_dictionaries(
    {"name": names}, optional={"description": texts, "parameters": st.sampled_from([{}, None, []]), "strict": texts}
)
tools = st.fixed_dictionaries({"type": st.sampled_from(["function", "x"]), "function": definitions})
chosen = st.fixed_dictionaries({"name": names})
choices = st.one_of(
    st.sampled_from(["none", "auto", "required", "x", None, 1]),
    st.fixed_dictionaries({"type": st.sampled_from(["function", "x"]), "function": chosen}),
    st.fixed_dictionaries({"type": st.just("function"), "name": names}),
)
biases = st.sampled_from([{}, {"5": 1}, {"x": 1}, {"5": True}, None])
shared: dict[str, st.SearchStrategy[Any]] = {"logit_bias": biases, "suffix": texts, "audio": texts}
chat_bodies = st.fixed_dictionaries(
    {"model": st.just(NAME), "messages": st.lists(chat_messages, max_size=2)},
    optional={"tools": st.none() | st.lists(tools, max_size=1), "tool_choice": choices, **shared},
)
items = st.one_of(
    st.fixed_dictionaries(
        {"role": roles, "content": contents}, optional={"type": st.sampled_from(["message", None]), "id": texts}
    ),
    st.fixed_dictionaries({"type": st.just("function_call"), "call_id": texts, "name": texts, "arguments": texts}),
    st.fixed_dictionaries({"type": st.just("function_call_output"), "call_id": texts, "output": contents}),
    st.sampled_from([{"type": "reasoning"}, None, "x"]),
)
kinds = st.sampled_from([{"type": "function"}, {"type": "x"}, {}])
flat_tools = st.builds(lambda kind, rest: {**kind, **rest}, kinds, definitions)
response_bodies = st.fixed_dictionaries(
    {"model": st.just(NAME), "input": contents | st.lists(items, max_size=2)},
    optional={
        "instructions": texts,
        "tools": st.none() | st.lists(flat_tools, max_size=1),
        "tool_choice": choices,
        "store": st.sampled_from([False, True, 0, None]),
        "background": st.sampled_from([False, True, 0, "false"]),
        "truncation": st.sampled_from(["disabled", "auto", None, 0]),
        "previous_response_id": texts,
        **shared,
    },
)
# refusals that say that fields disagree, or what this model cannot do: no matter of types
ABOUT_CONTENTS = (
    "Function names must be unique",
    "is only allowed when",
    "no function named",
    "Invalid parameter: messages with role 'tool'",
    "An assistant message with 'tool_calls'",
    "No tool output found",
    "No tool call found",
    "This model",
    "The last message must have the role",
    "Invalid schema",
)


@cache
def validator(schema: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(
        {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]}
    )


@pytest.mark.parametrize(
    ("path", "schema", "bodies"),
    [
        ("/chat/completions/input_tokens", "ChatRequest", chat_bodies),
        ("/responses/input_tokens", "ResponsesRequest", response_bodies),
    ],
    ids=["chat", "responses"],
)
def test_what_the_document_allows_is_taken_and_the_rest_is_not(
    app: Starlette, path: str, schema: str, bodies: st.SearchStrategy[dict[str, Any]]
) -> None:
    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(bodies)
    def check(body: dict[str, Any]) -> None:
        response = post(app, path, body)
        assert response.status_code in (200, 400), response.text
        message = "" if response.status_code == 200 else response.json()["error"]["message"]
        is_taken = not message or any(text in message for text in ABOUT_CONTENTS)
        reason = next(iter(validator(schema).iter_errors(body)), None)
        assert is_taken == (reason is None), (json.dumps(body), message, str(reason)[:300])

    check()


def test_the_document_has_the_projects_version_and_the_pattern_of_names() -> None:
    assert DOCUMENT["info"]["version"].count(".") == 2
    schemas = DOCUMENT["components"]["schemas"]
    for name in ("FunctionDefinition", "FunctionTool", "ChosenFunction", "FunctionChoice"):
        assert schemas[name]["properties"]["name"]["pattern"] == "^[a-zA-Z0-9_-]{1,64}$"
