"""Which schemas and patterns are compiled: unsupported keywords are named, and expensive ones are refused at once."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from serving.generation.interface import PromptError
from serving.generation.structured.grammar import (
    AnswerConstraint,
    ChoiceAnswer,
    JsonAnswer,
    RegexAnswer,
    answer_grammar,
)
from serving.generation.structured.json_schema import supported_schema
from serving.generation.structured.schema_parser import Work
from serving.generation.structured.token_masks import Grammars
from tests.contract.tiny import chat_format
from tests.cpu_time import million_steps


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


# (schema, where the fault is, what the message names)
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"properties": {"a/b": {"not": {"pattern": "x"}}}}, "'/properties/a~1b'", "'not'"),
    ({"type": "array", "uniqueItems": True}, "the schema itself", "'uniqueItems'"),
    ({"type": "array", "contains": {}, "maxContains": 2}, "the schema itself", "'maxContains'"),
    ({"propertyNames": {"pattern": "a", "maxLength": 1}}, "the schema itself", "'propertyNames'"),
    ({"items": {"unevaluatedProperties": False}}, "'/items'", "'unevaluatedProperties'"),
    ({"type": "object", "minProperties": 2}, "the schema itself", "'minProperties'"),
    ({"type": "number", "multipleOf": 0.01}, "the schema itself", "'multipleOf'"),
    ({"anyOf": [{"type": "string", "pattern": "a(?=b)"}, {}]}, "'/anyOf/0'", "look-around"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "the schema itself", "'oneOf'"),
    ({"items": {"oneOf": [{"pattern": "a"}, {"pattern": "b"}]}}, "'/items'", "'oneOf'"),
    ({"items": {"$ref": "http://x/y"}}, "'/items'", "'http://x/y'"),
    ({"items": {"$ref": "#/$defs/a"}}, "'/items'", "'#/$defs/a'"),
    ({"$schema": "http://json-schema.org/draft-03/schema#"}, "the schema itself", "'$schema'"),
    ({"$ref": "#"}, "the schema itself", "'$ref'"),
    ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, "itself", "'$ref'"),
    ({"type": "integer", "minimum": 2, "maximum": 1}, "the schema itself", "'minimum'"),
    (
        {"items": {"minLength": 2, "maxLength": 1, "type": "string"}, "minItems": 1, "type": "array"},
        "'/items'",
        "'minLength'",
    ),
    ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "the schema itself", "'a'"),
    ({"x-guidance": {"lenient": True}, "not": {"pattern": "x"}}, "the schema itself", "'not'"),
    ({"properties": {"a": {"type": "any"}}}, "'/properties/a'", "'type'"),
    ({"properties": {"a": []}}, "'/properties/a'", "an object or a boolean"),
    ({"items": {"maxLength": 2.5}}, "'/items'", "'maxLength'"),
    ({"items": {"enum": "x"}}, "'/items'", "'enum'"),
    ({"patternProperties": {"^a": {}, "b$": {}}}, "the schema itself", "'patternProperties'"),
]


@pytest.mark.parametrize(("value", "place", "named"), REFUSED)
def test_what_cannot_be_enforced_is_refused_with_keyword_and_place(
    grammars: Grammars, value: dict[str, Any], place: str, named: str
) -> None:
    message = refusal(grammars, schema(value))
    assert message.startswith("Invalid schema")
    assert place in message
    assert named in message
    assert "coerce" not in message


def test_messages_of_the_library_are_said_in_our_words(grammars: Grammars) -> None:
    fuel = {
        "type": "object",
        "properties": {f"p{i}": {"type": "integer", "multipleOf": 9973 + 2 * i} for i in range(2)},
    }
    assert "too large an automaton" in refusal(grammars, schema(fuel))
    lexer = {"type": "string", "pattern": "^" + "".join(f"(a{i}b|c{i}d[^x]*)?" for i in range(60)) + "$"}
    properties = {f"p{i}": {**lexer, "minLength": i} for i in range(90)}
    message = refusal(grammars, schema({"type": "object", "properties": properties, "required": list(properties)}))
    assert message.endswith("it is too complex to be compiled.")


def test_strict_asks_for_closed_objects_with_everything_required(grammars: Grammars) -> None:
    properties = {"a": {"type": "string"}}
    open_ = {"type": "object", "properties": properties, "required": ["a"]}
    assert "additionalProperties" in refusal(grammars, schema(open_, strict=True))
    optional = {"type": "object", "properties": properties, "additionalProperties": False}
    assert "required" in refusal(grammars, schema({"type": "array", "items": optional}, strict=True))
    closed = {**open_, "additionalProperties": False}
    assert answer_grammar(schema(closed, strict=True)) == answer_grammar(schema(closed))
    assert answer_grammar(schema(open_))


def supported(value: dict[str, Any]) -> dict[str, Any]:
    return supported_schema(value, "schema", "response_format")


def test_what_restricts_nothing_is_left_out() -> None:
    """So that a description that changes does not compile the same grammar again."""
    value = {
        "type": "object",
        "title": "t",
        "properties": {"format": {"type": "integer", "format": "int32", "description": "d"}},
        "required": [],
        "uniqueItems": False,
        "$comment": "c",
    }
    properties = {"format": {"type": "integer"}}
    assert supported(value) == {"type": "object", "properties": properties, "additionalProperties": False}
    assert supported({"type": "string", "format": "password"}) == {"type": "string"}


def test_whole_numbers_may_be_written_with_a_point() -> None:
    value = {"type": "string", "minLength": 1.0, "maxLength": 2.0}
    assert supported(value) == {"type": "string", "minLength": 1, "maxLength": 2}
    assert supported({"type": "array", "maxItems": 3.0, "minItems": 0.0})["maxItems"] == 3
    assert supported({"type": "integer", "multipleOf": 2.0})["multipleOf"] == 2


CLOSED = {"type": "object", "properties": {"a": {}}, "additionalProperties": False}


def test_an_object_that_leaves_it_open_gets_no_more_properties_than_it_lists() -> None:
    open_: dict[str, Any] = {"type": "object", "properties": {"a": {}}}
    assert supported(open_)["additionalProperties"] is False
    assert supported({"type": "object", "properties": {}})["additionalProperties"] is False
    assert "additionalProperties" not in supported({**open_, "required": ["a", "b"]})
    assert supported({**open_, "additionalProperties": True})["additionalProperties"] is True
    assert supported({"type": "object"}) == {"type": "object"}
    whole = supported({"allOf": [open_, {"properties": {"b": {}}, "required": ["b"]}]})
    assert set(whole["properties"]) == {"a", "b"}
    assert whole["additionalProperties"] is False


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    tricks: list[str] = []


class Owner(BaseModel):
    name: str
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    other: Cat | Dog | None = None


def test_alternatives_are_closed_one_by_one() -> None:
    """The `oneOf` of pydantic's discriminated unions once opened every object of the schema."""
    made = supported(Owner.model_json_schema())
    assert made["additionalProperties"] is False
    objects = [node for node in made["$defs"].values() if node.get("type") == "object"]
    assert [set(node["properties"]) for node in objects] == [{"kind", "tricks"}, {"kind", "lives"}]
    assert all(node["additionalProperties"] is False for node in objects)
    beside = {
        "properties": {"base": {}},
        "anyOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}, {"type": "null"}],
    }
    listed = [set(alternative.get("properties", ())) for alternative in supported(beside)["anyOf"]]
    assert listed == [{"base", "a"}, {"base", "b"}, set()]


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


def chain(length: int) -> dict[str, Any]:
    def link(i: int) -> dict[str, Any]:
        return {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/d{i}"}]}}}

    return {"$defs": {f"d{i}": link(i + 1) for i in range(length)} | {f"d{length}": {}}, **link(0)}


def optional_objects(count: int, num_properties: int) -> dict[str, Any]:
    made = {
        f"o{i}": {"type": "object", "properties": {f"p{i}_{k}": {} for k in range(num_properties)}}
        for i in range(count)
    }
    return {"type": "object", "properties": made}


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
    "optional properties": schema(optional_objects(9, 1000)),
    "objects": schema(optional_objects(250, 38)),
    "parts of one object": schema(
        {
            "allOf": [optional_objects(1, 200)["properties"]["o0"] | {"title": str(i)} for i in range(40)]
            + [{"properties": {f"q{i}_{k}": {} for k in range(200)}} for i in range(40)]
        }
    ),
    "patterns of names": schema({"type": "object", "patternProperties": {f"^a{i}_[a-z]+$": {} for i in range(300)}}),
    "dependencies": schema({"dependentRequired": {f"a{i}": [f"b{i}"] for i in range(20)}}),
    "conditions": schema(
        {"allOf": [{"if": {"properties": {f"k{i}": {"const": 1}}}, "then": {"required": [f"r{i}"]}} for i in range(60)]}
    ),
    "alternatives": schema({"oneOf": [{"type": "string", "pattern": f"^a{k}b"} for k in range(300)]}),
    "references": schema(
        {
            "$defs": {
                "a": {"allOf": [{"$ref": "#/$defs/b"}] * 9},
                "b": {"allOf": [{"$ref": "#/$defs/c"}] * 9},
                "c": {"allOf": [{"$ref": "#/$defs/d"}] * 9},
                "d": {"allOf": [{"$ref": "#/$defs/e"}] * 9},
                "e": {"allOf": [{"not": {"pattern": "x"}}] * 9},
            },
            "$ref": "#/$defs/a",
        }
    ),
    "pattern": schema({"type": "string", "pattern": "^((a{0,100}){0,100}){0,100}$"}),
    "regex": RegexAnswer("([a-z]{3,200}){3,200}", "response_format"),
    "long regex": RegexAnswer("(" * 5000 + ")" * 5000, "response_format"),
    "broken regex": RegexAnswer("(((", "response_format"),
    "choices": ChoiceAnswer(tuple(f"choice {i}" for i in range(20_000)), "response_format"),
}


@pytest.mark.parametrize("name", EXPENSIVE)
def test_an_expensive_constraint_is_refused_after_little_work(grammars: Grammars, name: str) -> None:
    """The work is counted, so the refusal does not depend on the machine; 169 KB once took 5.4 s."""
    assert grammars.vocabulary.num_words
    assert million_steps(lambda: refusal(grammars, EXPENSIVE[name])) < 40


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(x+x+)+y", ".*a.{200}", "(.*,){20}x", "a{1,5000}"])
def test_patterns_that_backtrack_without_end_in_other_engines_are_bounded(grammars: Grammars, pattern: str) -> None:
    def compile_and_follow() -> None:
        with suppress(PromptError):  # refused is as good
            mask = grammars.compile(answer_grammar(RegexAnswer(pattern, "guided_regex")), "", "").new_mask()
            for _ in range(20):
                words = mask.allowed()
                assert words is not None
                mask.accept(next(i for i in range(3, 400) if words[i // 32] >> i % 32 & 1))

    assert million_steps(compile_and_follow) < 80


def test_large_schemas_are_compiled(grammars: Grammars) -> None:
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}
    union = [
        {"properties": {"kind": {"const": f"k{i}"}, f"v{i}": {}}, "required": ["kind"], "type": "object"}
        for i in range(100)
    ]
    for value in (wide, nested(20), chain(50), {"enum": [f"value {i}" for i in range(5000)]}, {"oneOf": union}):
        grammars.compile(answer_grammar(schema(value)), "", "")


def test_the_work_for_all_schemas_of_a_request_is_bounded_together() -> None:
    """A hundred tools with schemas that are each allowed took minutes."""
    work = Work()

    def compile_all() -> None:
        for i in range(100):
            supported_schema({"title": f"{i}", **optional_objects(10, 60)}, "schema", "tools", work=work)

    with pytest.raises(PromptError, match="too complex"):
        compile_all()
