"""JSON schema of a client -> the schema that llguidance compiles, or PromptError that names the keyword.

llguidance compiles a subset of draft 2020-12 and reports most of what it does not support. This file refuses what it
would ignore silently, and schemas that would take too long, or too deep a stack, to compile.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, cast

from serving.generation.interface import PromptError

MAX_NODES = 20_000  # objects, arrays and values of a schema together
MAX_NESTING = 100  # of its text; llguidance's JSON parser ends at 128
MAX_DEPTH = 500  # schemas inside schemas, references followed once; the compiler's stack ends at about 1,600
MAX_PROPERTIES = 1000  # of one object
MAX_ENUM = 2000  # values of one enum
MAX_MULTIPLE = 20_000  # least common multiple of all `multipleOf`; the states of the automaton that counts
MAX_REPEATS = 5000  # product of nested bounds in a pattern
MAX_PATTERN = 2000  # characters

# draft 2020-12, and what earlier drafts called the same; some of them the compiler refuses by name
FORMATS = frozenset(
    (
        *("date-time", "time", "date", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"),
        *("uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer"),
        *("relative-json-pointer", "regex", "ip-address", "host-name", "color", "utc-millisec"),
    )
)
DIALECTS = ("2020-12", "2019-09", "draft-07", "draft-06", "draft-04", "json-schema.org/schema")

Schema = Mapping[str, Any]

_IN_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_IN_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")
_ATOM = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]", re.DOTALL)
_CLASS = re.compile(r"\\.", re.DOTALL)
# the fewest characters that any regular-expression engine means by a class, and the most
_FEWEST = {r"\d": "0-9", r"\w": r"0-9A-Za-z_\x{4E00}-\x{9FFF}", r"\s": r" \t\n\r"}
_MOST = {r"\d": r"\p{N}", r"\w": r"\p{L}\p{M}\p{N}_", r"\s": r"\s\x{1C}-\x{1F}\x{FEFF}"}
_INSIDE = _FEWEST | {name.upper(): f"[^{text}]" for name, text in _MOST.items()}
_INSIDE_NEGATED = _MOST | {name.upper(): f"[^{text}]" for name, text in _FEWEST.items()}
_OUTSIDE = {name: text if text.startswith("[^") else f"[{text}]" for name, text in _INSIDE.items()}
_REPEAT = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\((?:\?[^()]*?:)?|\)|\{(\d{1,9})(?:,(\d{0,9}))?\}", re.DOTALL)


def check_schema(schema: Schema, what: str, param: str, strict: bool) -> None:
    """Raises PromptError that names the keyword.

    what: how the message calls the schema, "schema for response_format 'x'"; param: the field of the request;
    strict: OpenAI's rules for `strict: true` apply, too.
    """

    def refuse(reason: str) -> PromptError:
        return PromptError(f"Invalid {what}: {reason}", param)

    count, nesting = _measure(schema)
    if count > MAX_NODES:
        raise refuse(f"it has more than {MAX_NODES} nodes.")
    if nesting > MAX_NESTING:
        raise refuse(f"it is nested more than {MAX_NESTING} levels deep.")
    if _depth(schema) > MAX_DEPTH:
        raise refuse(f"it is nested more than {MAX_DEPTH} levels deep, references followed.")
    if _refers_to_itself(schema):
        raise refuse("A '$ref' leads back to itself with nothing in between.")
    multiple = 1
    for path, node in schemas_in(schema):
        reason = _objection(node) or (_strict_objection(node) if strict else None)
        if reason:
            raise refuse(f"In {path or 'the schema itself'}: {reason}")
        multiple = math.lcm(multiple, _numerator(node.get("multipleOf")))
    if multiple > MAX_MULTIPLE:
        raise refuse("'multipleOf' needs too large an automaton.")


def compilable(schema: Schema) -> dict[str, Any]:
    """The schema for the compiler: it accepts the same documents, or fewer.

    Keywords that restrict nothing are left out (`uniqueItems: false`, formats that JSON Schema does not define), and
    patterns are made portable. An object that lists properties and does not say whether others are allowed gets
    `additionalProperties: false`: models that may invent properties do.
    """
    closes = not any(_combines(node) for _, node in schemas_in(schema))
    return cast("dict[str, Any]", _compilable(dict(schema), closes))


def _combines(node: Schema) -> bool:
    """Whether an object may be described by several schemas together, so that none of them can be closed alone."""
    return bool(node.keys() & {"allOf", "oneOf"}) or ("properties" in node and bool(node.keys() & {"$ref", "anyOf"}))


def _compilable(schema: Any, closes: bool) -> Any:
    if isinstance(schema, list):
        return [_compilable(item, closes) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in cast("dict[str, Any]", schema).items():
        if (key == "uniqueItems" and value is False) or (
            key == "format" and isinstance(value, str) and value not in FORMATS
        ):
            continue
        if key in ("enum", "const", "default", "examples"):
            out[key] = value
        elif key == "pattern" and isinstance(value, str):
            out[key] = portable(value)
        elif key in _IN_MAPS and isinstance(value, dict):
            named = cast("dict[str, Any]", value).items()
            is_by_pattern = key == "patternProperties"
            out[key] = {portable(k) if is_by_pattern else k: _compilable(item, closes) for k, item in named}
        else:
            out[key] = _compilable(value, closes)
    if closes and _is_open(out):
        out["additionalProperties"] = False
    return out


def _is_open(node: Schema) -> bool:
    """Whether it lists properties and does not say whether others are allowed."""
    properties, required = node.get("properties"), node.get("required", [])
    if not isinstance(properties, dict) or not properties or not isinstance(required, list):
        return False
    says = node.keys() & {"additionalProperties", "patternProperties", "minProperties"}
    return not says and all(name in properties for name in required)


def portable(pattern: str) -> str:
    """The pattern with \\d, \\w and \\s as the characters that all regular-expression engines agree on, and \\D, \\W,
    and \\S as those that none of them excludes. Their meaning depends on the Unicode version, or on ASCII."""

    def replaced(found: re.Match[str]) -> str:
        text = found.group()
        if text.startswith("["):
            inside = _INSIDE_NEGATED if text.startswith("[^") else _INSIDE
            return _CLASS.sub(lambda inner: inside.get(inner.group(), inner.group()), text)
        return _OUTSIDE.get(text, text)

    return _ATOM.sub(replaced, pattern)


def check_pattern(pattern: str) -> str | None:
    """Why a regular expression must not be compiled; None if it may be."""
    if len(pattern) > MAX_PATTERN:
        return f"the pattern has more than {MAX_PATTERN} characters."
    factors = [1]  # of the groups that are open
    largest = [1]  # inside them
    closed = 1  # the largest product inside the item that a bound would repeat
    for found in _REPEAT.finditer(pattern):
        token = found.group()
        if token.startswith("("):
            factors.append(1)
            largest.append(1)
        elif token == ")" and len(largest) > 1:
            factors.pop()
            closed = largest.pop()
            largest[-1] = max(largest[-1], closed)
        elif found.group(1) is not None:
            times = int(found.group(2) or found.group(1))
            largest[-1] = max(largest[-1], closed * times)
            closed = 1
        else:
            closed = 1
    if max(largest) > MAX_REPEATS:
        return f"the pattern repeats more than {MAX_REPEATS} times."
    return None


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
        values = inner if isinstance(inner, list) else [inner]
        for index, value in enumerate(values):
            yield from schemas_in(value, f"{path}/{key}/{index}" if isinstance(inner, list) else f"{path}/{key}")


def _objection(node: Schema) -> str | None:
    dialect = node.get("$schema", "2020-12")
    if not any(known in str(dialect) for known in DIALECTS):
        return f"'$schema' must be one of the drafts {', '.join(DIALECTS)}."
    properties = node.get("properties")
    if isinstance(properties, dict) and len(cast("dict[str, Any]", properties)) > MAX_PROPERTIES:
        return f"'properties' has more than {MAX_PROPERTIES} entries."
    enum = node.get("enum")
    if isinstance(enum, list) and len(enum) > MAX_ENUM:
        return f"'enum' has more than {MAX_ENUM} values."
    required = node.get("required")
    num_required = len(set(map(str, required))) if isinstance(required, list) else 0
    multiple = node.get("multipleOf")
    if isinstance(multiple, float) and Fraction(multiple) != Fraction(repr(multiple)):
        return f"'multipleOf' {multiple} is not supported: validators divide in binary, where it has no exact value."
    least = node.get("minProperties", 0)
    if isinstance(least, int | float) and least > max(1, num_required):
        return "'minProperties' greater than 1 is not supported beyond what 'required' names."
    by_pattern = node.get("patternProperties")
    patterns = [node.get("pattern"), *(cast("dict[str, Any]", by_pattern) if isinstance(by_pattern, dict) else ())]
    reasons = [check_pattern(pattern) for pattern in patterns if isinstance(pattern, str)]
    return next((reason for reason in reasons if reason), None)


def _strict_objection(node: Schema) -> str | None:
    """OpenAI's rules for `strict: true`: objects are closed, and all of their properties are required."""
    kind = node.get("type")
    if kind != "object" and "properties" not in node:
        return None
    if node.get("additionalProperties") is not False:
        return "'additionalProperties' is required to be supplied and to be false."
    properties = node.get("properties")
    required = node.get("required")
    names = set(cast("dict[str, Any]", properties)) if isinstance(properties, dict) else set[str]()
    listed = required if isinstance(required, list) else []
    missing = sorted(name for name in names if name not in listed)
    if missing:
        return (
            "'required' is required to be supplied and to be an array including every key in properties. "
            f"Missing '{missing[0]}'."
        )
    return None


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
        # definitions are met through the references to them
        stack += [(item, depth + 1) for key, item in node.items() if key not in ("$defs", "definitions")]
        reference = node.get("$ref")
        if isinstance(reference, str) and reference not in followed:
            followed.add(reference)
            stack.append((_target(schema, reference), depth + 1))
    return deepest


def _refers_to_itself(schema: Schema) -> bool:
    """Whether some schema contains itself through references and combinations alone: no document can satisfy it."""
    done: set[int] = set()
    open_: set[int] = set()
    stack: list[tuple[Any, bool]] = [(node, False) for _, node in schemas_in(schema)]
    while stack:
        node, is_left = stack.pop()
        if not isinstance(node, dict) or (id(node) in done and not is_left):
            continue
        if is_left:
            open_.discard(id(node))
            done.add(id(node))
            continue
        if id(node) in open_:
            return True
        open_.add(id(node))
        stack.append((node, True))
        same = cast("dict[str, Any]", node)
        reference = same.get("$ref")
        if isinstance(reference, str):
            stack.append((_target(schema, reference), False))
        for key in ("allOf", "anyOf", "oneOf"):
            inner = same.get(key)
            stack += [(item, False) for item in inner] if isinstance(inner, list) else []
    return False


def _target(schema: Schema, reference: str) -> Any:
    """The schema that a local reference points to; None for any other reference."""
    if reference == "#":
        return schema
    if not reference.startswith("#/"):
        return None
    value: Any = schema
    for step in reference[2:].split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        value = cast("dict[str, Any]", value).get(name) if isinstance(value, dict) else None
    return value


def _numerator(multiple: Any) -> int:
    """States of the automaton that accepts multiples of the number, the decimal point left out."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or multiple <= 0:
        return 1  # the compiler refuses it
    fraction = Fraction(repr(multiple))
    places = 0
    while 10**places % fraction.denominator:
        places += 1
    return int(fraction * 10**places)
