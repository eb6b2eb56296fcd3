"""Random answers of schemas with keywords that a grammar lacks: each validates against the client's own schema."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from serving.generation.interface import PromptError
from serving.generation.structured.grammar import JsonAnswer, answer_grammar
from serving.generation.structured.patterns import FORMATS
from serving.generation.structured.token_masks import Grammars
from tests.contract.tiny import chat_format

ENDINGS = (b'"', b"}", b"]", b'"}', b"0")  # sampled more often, so that answers end


class Answers:
    """Random answers of grammars over a small vocabulary."""

    def __init__(self, folder: Path) -> None:
        self.grammars = Grammars(chat_format(folder, "chatglm2"))
        vocabulary = self.grammars.vocabulary
        self.tokens = vocabulary.tokens
        self.stops = vocabulary.stop_token_ids
        self._endings = {i for i, token in enumerate(self.tokens) if token in ENDINGS} | self.stops

    def documents(self, schema: dict[str, Any], count: int, seed: int, length: int = 200) -> list[Any]:
        """The answers that end. Raises PromptError for a schema that is refused."""
        grammar = self.grammars.compile(
            answer_grammar(JsonAnswer(schema, "response_format")), "schema", "response_format"
        )
        choose = random.Random(seed)
        found: list[Any] = []
        for _ in range(count):
            mask, text = grammar.new_mask(), b""
            for _ in range(length):
                words = int.from_bytes(mask.allowed().numpy().tobytes(), "little")
                allowed = [i for i in range(len(self.tokens)) if words >> i & 1]
                ending = [i for i in allowed if i in self._endings]
                token_id = choose.choice(ending if ending and choose.random() < 0.5 else allowed)
                mask.accept(token_id)
                if token_id in self.stops:
                    if not re.search(rb"[eE][+-]?[0-9]{3}", text):  # Python reads such numbers as infinity
                        found.append(json.loads(text))
                    break
                text += self.tokens[token_id]
        return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(tmp_path_factory.mktemp("pieces"))


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def tagged(kind: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": kind}, **properties}, "required": ["kind"]}


TEXT, WHOLE = {"type": "string", "maxLength": 3}, {"type": "integer"}
AB = {"type": "object", "properties": {"a": TEXT, "b": WHOLE, "c": {"type": "null"}}}
# (schema, documents that must be possible, documents that must not)
SCHEMAS: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "oneOf by type": ({"oneOf": [TEXT, WHOLE, {"type": "null"}]}, ["x", 1, None], [True, []]),
    "oneOf by tag": (
        {"oneOf": [tagged("a", x=TEXT), tagged("b", x=WHOLE)]},
        [{"kind": "a", "x": "y"}, {"kind": "b", "x": 1}, {"kind": "a"}],
        [{"kind": "a", "x": 1}, {"kind": "b", "x": "y"}, {"x": 1}],
    ),
    "oneOf by a tag that may be left out": (
        {"oneOf": [closed(kind={"const": "a"}, x=TEXT), closed(kind={"const": "b"}, y=WHOLE)]},
        [{"kind": "a"}, {"x": "y"}, {"y": 1}, {"kind": "b", "y": 1}],
        [{}, {"kind": "a", "y": 1}],
    ),
    "oneOf by required": (
        {**AB, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": "x"}, {"b": 1}, {"b": 1, "c": None}],
        [{}, {"a": "x", "b": 1}],
    ),
    "oneOf of closed objects": ({"oneOf": [closed(a=TEXT), closed(b=WHOLE)]}, [{"a": "x"}, {"b": 1}], [{}, {"a": 1}]),
    "oneOf of arrays": (
        {"oneOf": [{"type": "array", "items": TEXT}, {"type": "array", "items": WHOLE}]},
        [["x"], [1, 2]],
        [[], ["x", 1]],
    ),
    "oneOf of numbers": ({"oneOf": [{"maximum": 1}, {"minimum": 2}], "type": "number"}, [0, 3.5], [1.5]),
    "oneOf of patterns": ({"type": "string", "oneOf": [{"pattern": "^a"}, {"pattern": "^b"}]}, ["ax", "b"], ["c"]),
    "oneOf, one part of the other": ({"oneOf": [{"enum": ["x", "y"]}, {"enum": ["x", "z"]}]}, ["y", "z"], ["x"]),
    "oneOf through references": (
        {"$defs": {"a": tagged("a"), "b": tagged("b")}, "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]},
        [{"kind": "a"}, {"kind": "b"}],
        [{}, {"kind": "c"}],
    ),
    "dependentRequired": (
        {**AB, "dependentRequired": {"a": ["b"]}},
        [{}, {"b": 1}, {"a": "x", "b": 1}, {"c": None}],
        [{"a": "x"}, {"a": "x", "c": None}],
    ),
    "dependencies": (
        {"$schema": "http://json-schema.org/draft-07/schema#", **AB,
         "dependencies": {"a": ["b"], "c": {"properties": {"b": {"minimum": 5}}, "required": ["b"]}}},
        [{}, {"b": 1}, {"a": "x", "b": 1}, {"b": 7, "c": None}],
        [{"a": "x"}, {"b": 1, "c": None}],
    ),
    "dependencies both ways": (
        {**AB, "dependentRequired": {"a": ["b"], "b": ["a"]}},
        [{}, {"a": "x", "b": 1}, {"c": None}],
        [{"a": "x"}, {"b": 1}],
    ),
    "if": (
        {**AB, "if": {"properties": {"a": {"const": "x"}}, "required": ["a"]}, "then": {"required": ["b"]},
         "else": {"required": ["c"]}},
        [{"a": "x", "b": 1}, {"c": None}, {"a": "y", "c": None}],
        [{"a": "x"}, {"a": "y", "b": 1}, {"b": 1}],
    ),
    "chain of conditions": (
        {**closed(kind={"enum": ["a", "b", "c"]}, x=WHOLE, y=WHOLE), "required": ["kind"],
         "allOf": [{"if": {"properties": {"kind": {"const": k}}}, "then": {"required": [n]}} for k, n in ("ax", "by")]},
        [{"kind": "a", "x": 1}, {"kind": "b", "y": 1}, {"kind": "c"}],
        [{"kind": "a"}, {"kind": "b", "x": 1}],
    ),
    "not a type": ({"not": {"type": ["object", "array", "string", "null", "boolean"]}}, [1, 1.5], ["x", None]),
    "not an enum": ({"enum": ["a", "b", "c"], "not": {"enum": ["b"]}}, ["a", "c"], ["b"]),
    "not a text": (
        {"type": "string", "maxLength": 3, "not": {"enum": ["a", "ab", ""]}},
        ["b", "aa", "abc"],
        ["a", "ab", ""],
    ),
    "not a number": ({"type": "integer", "not": {"const": 3}, "minimum": 2, "maximum": 5}, [2, 4, 5], [3]),
    "not required": ({**AB, "not": {"required": ["a", "b"]}}, [{}, {"a": "x"}, {"b": 1}], [{"a": "x", "b": 1}]),
    "not any": ({**AB, "not": {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}}, [{}, {"c": None}], [{"a": "x"}]),
    "propertyNames": (
        {"type": "object", "additionalProperties": WHOLE, "propertyNames": {"pattern": "^[ab]+$"}, "maxProperties": 2},
        [{}, {"ab": 1}],
        [{"c": 1}, {"a": "x"}],
    ),
    "names of an enum": (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": WHOLE},
        [{}, {"a": 1}, {"a": 1, "b": 2}],
        [{"c": 1}],
    ),
    "unique values": (
        {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True, "minItems": 1},
        [["a"], ["c", "a"], ["b", "c", "a"]],
        [[], ["a", "a"]],
    ),
    "lookaheads": (
        {"type": "string", "pattern": r"^(?=.*[0-9])(?!ab|cd$)[a-d0-9]{2,4}$"},
        ["a1", "cd1", "a111"],
        ["ab1", "cd", "aa"],
    ),
    "contains": (
        {"type": "array", "items": {"enum": [1, "x"]}, "contains": {"type": "integer"}, "maxItems": 3},
        [[1], [1, "x"], [1, 1, "x"]],
        [[], ["x"]],
    ),
    "one property at least": ({**AB, "minProperties": 1}, [{"a": "x"}, {"b": 1, "c": None}], [{}]),
    "allOf with references": (
        {"$defs": {"base": {"properties": {"id": WHOLE}, "required": ["id"]}},
         "allOf": [{"$ref": "#/$defs/base"}, {"properties": {"name": TEXT}}], "type": "object"},
        [{"id": 1}, {"id": 1, "name": "x"}],
        [{}, {"name": "x"}, {"id": 1, "other": 2}],
    ),
    "a tree": (
        {"$defs": {"n": {"type": "object", "properties": {"v": WHOLE, "l": {"$ref": "#/$defs/n"}}, "required": ["v"]}},
         "anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]},
        [None, {"v": 1}, {"v": 1, "l": {"v": 2}}],
        [{"v": 1, "l": 2}],
    ),
    "references by anchor and identifier": (
        {"$id": "http://x/y", "$defs": {"a": {"$anchor": "here", **TEXT}},
         "prefixItems": [{"$ref": "#here"}, {"$ref": "http://x/y#/$defs/a"}], "items": False, "type": "array"},
        [["x", "y"], []],
        [[1], ["x", "y", "z"]],
    ),
    "an identifier inside of the schema": (
        {"$id": "http://x/root",
         "$defs": {"t": WHOLE, "a": {"$id": "inner", "$defs": {"t": TEXT}, "$ref": "#/$defs/t"}},
         "prefixItems": [{"$ref": "inner"}, {"$ref": "#/$defs/t"}], "items": False, "type": "array"},
        [["x", 1], ["x"]],
        [[1], ["x", "y"]],
    ),
    "draft 4": (
        {"$schema": "http://json-schema.org/draft-04/schema#", "type": "array", "items": [WHOLE, TEXT],
         "additionalItems": False, "minItems": 1},
        [[1], [1, "x"]],
        [["x"], [1, "x", 2]],
    ),
}  # fmt: skip


def accepts(answers: Answers, schema: dict[str, Any], document: Any) -> bool:
    """Whether the grammar lets the document through, byte by byte."""
    text = answer_grammar(JsonAnswer(schema, "response_format"))
    mask = answers.grammars.compile(text, "schema", "response_format").new_mask()
    for byte in json.dumps(document).encode():
        token_id = answers.tokens.index(bytes([byte]))
        if not int.from_bytes(mask.allowed().numpy().tobytes(), "little") >> token_id & 1:
            return False
        mask.accept(token_id)
    return bool(mask.may_end)


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_validate_and_say_what_the_schema_allows(answers: Answers, name: str) -> None:
    schema, possible, impossible = SCHEMAS[name]
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)(schema)
    found = answers.documents(schema, 25, seed=1)
    assert found
    for document in found:
        validator.validate(document)
    for document in possible:
        validator.validate(document)
        assert accepts(answers, schema, document), document
    for document in impossible:
        assert not accepts(answers, schema, document), document


@pytest.mark.parametrize("name", FORMATS)
def test_answers_of_a_format_are_what_validators_take_for_it(answers: Answers, name: str) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    for text in answers.documents({"type": "string", "format": name}, 60, seed=2):
        assert checker.conforms(text, name), text
    both = {"type": "string", "format": name, "pattern": "[0-9a-z]", "maxLength": 60}
    assert all(len(text) <= 60 for text in answers.documents(both, 5, seed=2))


KEYWORDS = [
    *("type", "enum", "const", "properties", "required", "additionalProperties", "patternProperties", "minProperties"),
    *("maxProperties", "items", "prefixItems", "minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum"),
    *("minLength", "maxLength", "pattern", "contains", "anyOf", "oneOf", "allOf", "not", "if", "dependentRequired"),
    *("dependentSchemas", "propertyNames", "$ref", "uniqueItems", "multipleOf"),
]
OF_SCHEMAS = {"anyOf", "oneOf", "allOf", "not", "if", "dependentSchemas", "properties", "items", "prefixItems"}


def random_schema(choose: random.Random, depth: int = 0) -> Any:
    """A small schema of all keywords together, over few names and values."""
    if choose.random() < 0.06:
        return choose.choice([True, False])
    schema: dict[str, Any] = {}

    def inner() -> Any:
        return random_schema(choose, depth + 1)

    for keyword in choose.sample(KEYWORDS, choose.randint(1, 4)):
        if depth > 2 and keyword in OF_SCHEMAS:
            continue
        makers: dict[str, Any] = {
            "type": lambda: choose.choice(
                ["object", "object", "string", "integer", "array", ["string", "null"], "number"]
            ),
            "enum": lambda: choose.sample(
                [1, 2, 1.5, "x", "abc", None, True, {}, {"a": 1}, [1], []], choose.randint(1, 5)
            ),
            "const": lambda: choose.choice([1, "x", None, True, {"a": 1}]),
            "properties": lambda: {name: inner() for name in choose.sample("abc", choose.randint(1, 3))},
            "patternProperties": lambda: {choose.choice(["^a", "b$", "^x", ".*"]): inner()},
            "required": lambda: choose.sample("abc", choose.randint(1, 2)),
            "additionalProperties": lambda: choose.choice([False, True, {"type": "string"}]),
            "items": inner,
            "not": inner,
            "contains": inner,
            "prefixItems": lambda: [inner() for _ in range(choose.randint(1, 2))],
            "pattern": lambda: choose.choice(["^x", "y$", "^[a-c]*$", r"\d", "^(?!x|a$)"]),
            "dependentRequired": lambda: {choose.choice("abc"): choose.sample("abc", choose.randint(0, 2))},
            "dependentSchemas": lambda: {choose.choice("abc"): inner()},
            "propertyNames": lambda: choose.choice([{"pattern": "^[ab]"}, {"enum": ["a", "x"]}, {"maxLength": 2}]),
            "$ref": lambda: choose.choice(["#/$defs/p", "#/$defs/q"]),
            "uniqueItems": lambda: True,
            "multipleOf": lambda: choose.choice([2, 3, 0.5]),
        }
        if keyword in ("anyOf", "oneOf", "allOf"):
            schema[keyword] = [inner() for _ in range(choose.randint(1, 3))]
        elif keyword == "if":
            schema |= {"if": inner(), "then": inner(), "else": inner()}
        elif keyword in makers:
            schema[keyword] = makers[keyword]()
        else:
            schema[keyword] = choose.choice([0, 1, 2, 3, 2.0])
    return schema


def test_answers_of_random_schemas_are_valid(answers: Answers) -> None:
    """37,000 answers of 3,200 such schemas were, too."""
    num_compiled = num_answers = 0
    refusals: list[str] = []
    for seed in range(400):
        choose = random.Random(seed)
        root = random_schema(choose)
        schema: dict[str, Any] = root if isinstance(root, dict) else {"items": root}
        if seed % 3:
            schema.setdefault("type", "object")
        schema["$defs"] = {"p": random_schema(choose, 1), "q": random_schema(choose, 1)}
        validator = jsonschema.Draft202012Validator(schema)
        try:
            found = answers.documents(schema, 6, seed, 120)
        except PromptError as error:
            refusals.append(error.message)
            continue
        num_compiled += 1
        num_answers += len(found)
        assert all(validator.is_valid(document) for document in found), schema
    assert all("In " in message or "no document" in message for message in refusals), refusals
    assert num_compiled > 150
    assert num_answers > 700
