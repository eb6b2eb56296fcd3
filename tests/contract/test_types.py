"""Every field of every request takes JSON values of its own type and no others, and says which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette

from serving.openai.openapi import OPERATIONS
from tests.contract.tiny import NAME, USER, assert_openai_error, post

EXAMPLES: dict[str, dict[str, Any]] = {
    "/chat/completions": {"model": NAME, "messages": USER, "max_tokens": 1},
    "/completions": {"model": NAME, "prompt": "x", "max_tokens": 1},
    "/responses": {"model": NAME, "input": "x", "max_output_tokens": 1},
    "/embeddings": {"model": NAME, "input": "x"},
    "/tokenize": {"model": NAME, "prompt": "x"},
    "/detokenize": {"model": NAME, "tokens": [5]},
}
EXPECTED = {"boolean": "a boolean", "integer": "an integer", "number": "a number", "string": "a string"}
WRONG: dict[str, list[Any]] = {
    "boolean": [0, 1, 0.0, "false", "true", "", [], {}],
    "integer": [True, False, "1", 5.0, 1.5, [], {}],
    "number": [True, False, "1", [], {}],
    "string": [True, False, 0, 1.5, [], {}],
}


def scalar_fields() -> Iterator[tuple[str, str, str]]:
    """(path, field, JSON type) of every field of a body whose value is not composed."""
    for operation in OPERATIONS:
        if operation.request is None or operation.path not in EXAMPLES:
            continue
        for name, field in operation.request.model_json_schema()["properties"].items():
            kinds = {branch.get("type") for branch in field.get("anyOf", [field])} - {"null"}
            if len(kinds) == 1 and (kind := kinds.pop()) in WRONG:
                yield operation.path, name, kind


FIELDS = list(scalar_fields())


def test_the_fields_are_found() -> None:
    assert len(FIELDS) > 80
    assert ("/responses", "background", "boolean") in FIELDS


@pytest.mark.parametrize(("path", "name", "kind"), FIELDS, ids=[f"{path} {name}" for path, name, _ in FIELDS])
def test_a_value_of_another_type_is_refused_by_name(app: Starlette, path: str, name: str, kind: str) -> None:
    for value in WRONG[kind]:
        error = assert_openai_error(post(app, path, {**EXAMPLES[path], name: value}), 400)
        assert (error["param"], error["code"]) == (name, "invalid_type"), (value, error)
        assert error["message"].startswith(f"Invalid type for '{name}': expected {EXPECTED[kind]}, but got "), error


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("/chat/completions", {"messages": [{"role": True, "content": "x"}]}, "messages[0].role"),
        (
            "/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": 1}]}]},
            "messages[0].content[0].type",
        ),
        ("/chat/completions", {"response_format": {"type": False}}, "response_format.type"),
        ("/chat/completions", {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ("/chat/completions", {"logit_bias": {"5": True}}, "logit_bias.5"),
        ("/chat/completions", {"tools": [{"type": True, "function": {"name": "f"}}]}, "tools[0].type"),
        (
            "/tokenize",
            {"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]},
            "tools[0].function.strict",
        ),
        ("/completions", {"prompt": [5, 5.0]}, "prompt[1]"),
        ("/completions", {"prompt": [5, True]}, "prompt[1]"),
        ("/responses", {"tools": [{"type": "function", "name": "f", "strict": 0}]}, "tools[0].strict"),
        ("/responses", {"input": [{"role": 0, "content": "x"}]}, "input[0].role"),
        ("/responses", {"text": {"format": {"type": True}}}, "text.format.type"),
        ("/responses", {"text": {"verbosity": 1}}, "text.verbosity"),
        ("/detokenize", {"tokens": [5.0]}, "tokens[0]"),
    ],
)
def test_nested_fields_likewise(app: Starlette, path: str, change: dict[str, Any], param: str) -> None:
    error = assert_openai_error(post(app, path, {**EXAMPLES[path], **change}), 400)
    assert (error["param"], error["code"]) == (param, "invalid_type")
