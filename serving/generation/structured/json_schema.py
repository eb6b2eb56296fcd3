"""JSON schema of a client -> the schema that llguidance compiles, or PromptError with the keyword and its JSON pointer.

llguidance compiles a subset of draft 2020-12. `schema_parser` reads drafts 4 to 2020-12, `schema_rewriter` expresses
what the subset lacks as alternatives, and `schema_merging` merges and closes objects. The result accepts the same
documents as the client's schema, or fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, cast

from serving.generation.interface import PromptError
from serving.generation.structured.schema_parser import ParsedSchema, SchemaError, Work, parse_schema
from serving.generation.structured.schema_rewriter import rewrite

MAX_VALUES = 20_000  # objects, arrays and values of a schema together
MAX_NESTING = 100  # of its text; llguidance's JSON parser ends at 128
MAX_DEPTH = 500  # schemas inside schemas, references followed once; the compiler's stack ends at about 1,600
MAX_MULTIPLE = 20_000  # least common multiple of all `multipleOf`; the states of the automaton that counts

BOUNDS = ("minimum", "maximum")

Schema = Mapping[str, Any]

_IN_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_IN_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("items", "additionalProperties", "not", "if", "then", "else", "propertyNames")


def supported_schema(
    schema: Schema, what: str, param: str, strict: bool = False, work: Work | None = None
) -> dict[str, Any]:
    """The schema for the compiler. Raises PromptError.

    what: how the message calls the schema, "schema for response_format 'x'"; param: the field of the request;
    strict: OpenAI's rules for `strict: true` apply, too; work: counts for all schemas of a request.
    """
    try:
        return _supported(schema, strict, work or Work())
    except SchemaError as error:
        location = f"'{error.pointer}'" if error.pointer else "the schema itself"
        raise PromptError(f"Invalid {what}: In {location}: {error.reason}", param) from None
    except RecursionError:  # many schemas inside of schemas, each with many alternatives
        raise PromptError(f"Invalid {what}: it is too complex: its schemas are nested too deeply.", param) from None


def _supported(schema: Schema, strict: bool, work: Work) -> dict[str, Any]:
    count, nesting = _measure(schema)
    if count > MAX_VALUES:
        raise SchemaError("", f"it has more than {MAX_VALUES} values.")
    if nesting > MAX_NESTING:
        raise SchemaError("", f"it is nested more than {MAX_NESTING} levels deep.")
    if strict:
        _check_strict(schema)
    parsed = parse_schema(schema, work)
    _check_references(parsed)
    _check_multiples(parsed)
    result = rewrite(parsed, work)
    if _depth(result) > MAX_DEPTH:
        raise SchemaError("", f"it is nested more than {MAX_DEPTH} levels deep, references followed.")
    _count_compilation(result, work)
    return result


def schemas_in(schema: Any, path: str = "") -> Iterator[tuple[str, Schema]]:
    """`schema` and every schema inside it, with its path. Values of enum and const are not schemas."""
    if not isinstance(schema, dict):
        return
    node = cast("dict[str, Any]", schema)
    yield path, node
    for key in _IN_MAPS:
        inner = node.get(key)
        if isinstance(inner, dict):
            for name, value in cast("dict[str, Any]", inner).items():
                yield from schemas_in(value, f"{path}/{key}/{name}")
    for key in (*_IN_LISTS, *_SINGLE):
        inner = node.get(key)
        if isinstance(inner, list) and key in _IN_LISTS:
            for index, value in enumerate(inner):
                yield from schemas_in(value, f"{path}/{key}/{index}")
        elif key in _SINGLE:
            yield from schemas_in(inner, f"{path}/{key}")


def _check_strict(schema: Schema) -> None:
    """OpenAI's rules for `strict: true`: objects are closed, and all of their properties are required."""
    for path, node in schemas_in(schema):
        if node.get("type") != "object" and "properties" not in node:
            continue
        if node.get("additionalProperties") is not False:
            raise SchemaError(path, "'additionalProperties' is required to be supplied and to be false.")
        properties, required = node.get("properties"), node.get("required")
        listed = required if isinstance(required, list) else []
        names = sorted(cast("dict[str, Any]", properties)) if isinstance(properties, dict) else []
        missing = next((name for name in names if name not in listed), None)
        if missing is not None:
            raise SchemaError(
                path,
                "'required' is required to be supplied and to be an array including every key in properties. "
                f"Missing '{missing}'.",
            )


def _measure(schema: Schema) -> tuple[int, int]:
    """(number of values, levels of nesting) of the schema's text."""
    count = deepest = 0
    stack: list[tuple[Any, int]] = [(schema, 1)]
    while stack:
        value, depth = stack.pop()
        count += 1
        deepest = max(deepest, depth)
        if isinstance(value, dict):
            stack += [(item, depth + 1) for item in cast("dict[str, Any]", value).values()]
        elif isinstance(value, list):
            stack += [(item, depth + 1) for item in value]
    return count, deepest


def _depth(schema: Schema) -> int:
    """Levels of schemas inside schemas, each reference followed the first time it is met, as the compiler does."""
    definitions = schema.get("$defs", {})
    deepest = 0
    followed: set[str] = set()
    stack: list[tuple[Any, int]] = [(schema, 1)]
    while stack:
        value, depth = stack.pop()
        if not isinstance(value, dict | list):
            continue
        deepest = max(deepest, depth)
        if isinstance(value, list):
            stack += [(item, depth) for item in value]
            continue
        node = cast("dict[str, Any]", value)
        stack += [(item, depth + 1) for key, item in node.items() if key not in ("$defs", "enum")]
        reference = node.get("$ref")
        if isinstance(reference, str) and reference not in followed:
            followed.add(reference)
            stack.append((definitions[reference.removeprefix("#/$defs/")], depth + 1))
    return deepest


def _count_compilation(schema: Schema, work: Work) -> None:
    """Counts what llguidance needs at most to compile the schema and to try it.

    Measured with llguidance 1.9 on schemas of up to 300 KB, by the number of schemas, properties, patterns and values.
    """
    stack: list[Any] = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack += node
        if not isinstance(node, dict):
            continue
        properties, required = node.get("properties", {}), {*node.get("required", ())}
        num_optional = sum(name not in required for name in properties)
        work.count(1 + 0.2 * len(properties) + num_optional**2 / 1500 + len(node.get("patternProperties", ())) ** 2 / 5)
        if "pattern" in node:
            work.count_once(node["pattern"], len(node["pattern"]) / 120)
        low, high = (tuple(node.get(key) for key in (bound, f"exclusive{bound.title()}")) for bound in BOUNDS)
        if any(bound is not None for bound in low) and any(bound is not None for bound in high):
            work.count_once((low, high), 3)
        if "enum" in node:
            characters = sum(len(value) for value in node["enum"] if isinstance(value, str))
            work.count((0.8 if "pattern" in node else 0.15) * _measure(node["enum"])[0] + characters / 400)
        for key, value in node.items():
            if key in ("properties", "patternProperties", "$defs"):
                stack += cast("dict[str, Any]", value).values()
            elif key in ("items", "additionalProperties", "prefixItems", "anyOf", "allOf"):
                stack.append(value)


def _check_references(parsed: ParsedSchema) -> None:
    """Refuses a schema that contains itself through references and combinations alone: no document satisfies it."""
    done: set[int] = set()
    open_: set[int] = set()
    stack: list[tuple[Any, bool]] = [({"$ref": pointer}, False) for pointer in parsed.definitions]
    while stack:
        node, is_left = stack.pop()
        if not isinstance(node, dict) or (id(node) in done and not is_left):
            continue
        if is_left:
            open_.discard(id(node))
            done.add(id(node))
            continue
        if id(node) in open_:
            raise SchemaError("", "A '$ref' leads back to itself with nothing in between.")
        open_.add(id(node))
        stack.append((node, True))
        if "$ref" in node:
            stack.append((parsed.definitions[node["$ref"]], False))
        for key in ("allOf", "anyOf", "oneOf"):
            stack += [(item, False) for item in node.get(key, ())]


def _check_multiples(parsed: ParsedSchema) -> None:
    multiple = 1
    stack: list[Any] = [parsed.root, *parsed.definitions.values()]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack += node
        elif isinstance(node, dict):
            multiple = math.lcm(multiple, _numerator(node.get("multipleOf")))
            stack += [value for key, value in node.items() if key != "enum"]
    if multiple > MAX_MULTIPLE:
        raise SchemaError("", "'multipleOf' needs too large an automaton.")


def _numerator(multiple: Any) -> int:
    """States of the automaton that accepts multiples of the number, the decimal point left out."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or multiple <= 0:
        return 1
    fraction = Fraction(repr(multiple))
    digits = 0
    while 10**digits % fraction.denominator:
        digits += 1
    return int(fraction * 10**digits)
