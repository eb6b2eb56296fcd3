"""Which schemas and patterns are compiled: unsupported keywords are named, and expensive ones are refused at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from serving.generation.interface import PromptError
from serving.generation.structured.grammar import (
    AnswerConstraint,
    ChoiceAnswer,
    JsonAnswer,
    RegexAnswer,
    answer_grammar,
)
from serving.generation.structured.json_schema import compilable
from serving.generation.structured.token_masks import Grammars
from tests.contract.tiny import chat_format


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    return Grammars(chat_format(tmp_path_factory.mktemp("pieces"), "chatglm2"))


def refusal(grammars: Grammars, constraint: AnswerConstraint) -> str:
    """The message; the test fails if the constraint is accepted."""
    with pytest.raises(PromptError) as caught:
        grammars.compile(answer_grammar(constraint), "schema", constraint.param)
    assert caught.value.param == "response_format"
    assert len(caught.value.message) < 500
    return caught.value.message


def schema(value: dict[str, Any], strict: bool = False) -> JsonAnswer:
    return JsonAnswer(value, "response_format", strict=strict)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"not": {}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"propertyNames": {"maxLength": 1}}, "propertyNames"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "number", "multipleOf": 0.01}, "multipleOf"),
        ({"type": "string", "format": "iri"}, "iri"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$ref": "http://x/y"}, "http://x/y"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "$schema"),
        ({"$ref": "#"}, "$ref"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, "$ref"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a'"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(grammars: Grammars, value: dict[str, Any], named: str) -> None:
    assert named in refusal(grammars, schema(value))


def test_strict_asks_for_closed_objects_with_everything_required(grammars: Grammars) -> None:
    properties = {"a": {"type": "string"}}
    open_ = {"type": "object", "properties": properties, "required": ["a"]}
    assert "additionalProperties" in refusal(grammars, schema(open_, strict=True))
    optional = {"type": "object", "properties": properties, "additionalProperties": False}
    assert "required" in refusal(grammars, schema({"type": "array", "items": optional}, strict=True))
    closed = {**open_, "additionalProperties": False}
    assert answer_grammar(schema(closed, strict=True)) == answer_grammar(schema(closed))
    assert answer_grammar(schema(open_))


def test_formats_that_restrict_nothing_are_ignored(grammars: Grammars) -> None:
    value = {
        "type": "object",
        "properties": {"format": {"type": "integer", "format": "int32"}},
        "const": {"format": "x"},
    }
    expected = {**value, "properties": {"format": {"type": "integer"}}, "additionalProperties": False}
    assert compilable(value) == expected
    grammars.compile(answer_grammar(schema({"type": "string", "format": "password"})), "", "")


def test_an_object_that_leaves_it_open_gets_no_more_properties_than_it_lists() -> None:
    open_ = {"type": "object", "properties": {"a": {}}, "required": ["a"]}
    assert compilable(open_)["additionalProperties"] is False
    for value in (
        {**open_, "additionalProperties": True},
        {**open_, "required": ["a", "b"]},
        {"allOf": [open_, {"properties": {"b": {}}, "required": ["b"]}]},
        {"oneOf": [open_]},
        {**open_, "anyOf": [{"required": ["b"]}]},
        {"type": "object"},
    ):
        assert compilable(value) == value


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


def chain(length: int) -> dict[str, Any]:
    def link(i: int) -> dict[str, Any]:
        return {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/d{i}"}]}}}

    return {"$defs": {f"d{i}": link(i + 1) for i in range(length)} | {f"d{length}": {}}, **link(0)}


EXPENSIVE: dict[str, AnswerConstraint] = {
    "depth": schema(nested(600)),
    "chain of references": schema(chain(3000)),
    "size": schema({"anyOf": [{"type": "string", "maxLength": i} for i in range(9000)]}),
    "enum": schema({"enum": [f"value {i}" for i in range(50_000)]}),
    "properties": schema({"type": "object", "properties": {f"p{i}": {} for i in range(5000)}}),
    "multiple": schema({"type": "integer", "multipleOf": 99_991}),
    "multiples": schema({"allOf": [{"type": "integer", "multipleOf": 999}, {"multipleOf": 1001}]}),
    "product": schema(
        {"allOf": [{"anyOf": [{"type": "object", "required": [f"a{i}{j}"]} for j in range(6)]} for i in range(8)]}
    ),
    "pattern": schema({"type": "string", "pattern": "^((a{0,100}){0,100}){0,100}$"}),
    "regex": RegexAnswer("([a-z]{3,200}){3,200}", "response_format"),
    "long regex": RegexAnswer("(" * 5000 + ")" * 5000, "response_format"),
    "broken regex": RegexAnswer("(((", "response_format"),
    "choices": ChoiceAnswer(tuple(f"choice {i}" for i in range(20_000)), "response_format"),
}


@pytest.mark.parametrize("name", EXPENSIVE)
def test_an_expensive_constraint_is_refused_within_a_second(grammars: Grammars, name: str) -> None:
    assert grammars.vocabulary.num_words
    started = time.thread_time()
    assert refusal(grammars, EXPENSIVE[name])
    assert time.thread_time() - started < 1.0


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(x+x+)+y", ".*a.{200}", "(.*,){20}x", "a{1,5000}"])
def test_patterns_that_backtrack_without_end_in_other_engines_are_bounded(grammars: Grammars, pattern: str) -> None:
    started = time.thread_time()
    try:
        mask = grammars.compile(answer_grammar(RegexAnswer(pattern, "guided_regex")), "", "").new_mask()
        for _ in range(20):
            words = mask.allowed()
            assert words is not None
            mask.accept(next(i for i in range(3, 400) if words[i // 32] >> i % 32 & 1))
    except PromptError:
        pass  # refused is as good
    assert time.thread_time() - started < 2.0


def test_large_schemas_are_compiled(grammars: Grammars, tmp_path: Path) -> None:
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}
    for value in (wide, nested(20), chain(50), {"enum": [f"value {i}" for i in range(1000)]}):
        grammars.compile(answer_grammar(schema(value)), "", "")
