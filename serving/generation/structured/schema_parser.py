"""JSON schema of a client -> the same schema in few keywords, or SchemaError with the keyword and its JSON pointer.

Drafts 4 to 2020-12 are read. In the result, `type` is a list, `const` an `enum` of one value, an array of `items` is
`prefixItems`, `format` is a pattern, all kinds of dependencies are one list, and `$ref` is the JSON pointer of its
target, which has an entry in `definitions`. Three keys are our own: `pointer` is the JSON pointer of the
schema, `widest` the pattern that matches what any regular-expression engine matches, `newer` the value of a `const` in
draft 4, which lacks it.
Annotations and keywords that restrict nothing are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, cast
from urllib.parse import unquote, urldefrag, urljoin

from serving.generation.structured.patterns import FORMATS, check_pattern, portable, split_lookaheads, syntax_error

MAX_WORK = 9_000.0  # units of about 0.1 ms for one request: parsing, rewriting and compiling all its schemas
MAX_PROPERTIES = 1000  # of one object
MAX_ENUM = 10_000  # values of one enum
MAX_NUMBER = 1e300
MAX_COUNT = 2**53  # of lengths and items
PATTERN_CHARACTERS = 50.0  # that are checked with one unit of work
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
OLD_DRAFTS = ("draft-00", "draft-01", "draft-02", "draft-03")
VALUES = ("enum", "const", "default", "examples")  # they hold no schemas
UNSUPPORTED = (
    *("maxContains", "unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"),
    *("extends", "disallow", "divisibleBy"),  # of draft 3
)

Node = Any  # a parsed schema: a dict of the keywords above, True or False


class SchemaError(Exception):
    """Why a schema is not supported. pointer: the JSON pointer of the schema in question."""

    def __init__(self, pointer: str, reason: str) -> None:
        super().__init__(reason)
        self.pointer = pointer
        self.reason = reason


class Work:
    """Counts the work for the schemas of one request, so that its limit does not depend on the machine's load."""

    def __init__(self) -> None:
        self._units = 0.0
        self._seen: set[object] = set()

    def count_once(self, part: object, units: float) -> None:
        """Counts a part of a grammar that takes no more work when it is compiled again."""
        if part not in self._seen:
            self._seen.add(part)
            self.count(units)

    def count(self, units: float) -> None:
        """Raises SchemaError at the limit."""
        self._units += units
        if self._units > MAX_WORK:
            raise SchemaError("", "it is too large or too complex: it would take too long to compile.")


@dataclass
class ParsedSchema:
    """A parsed schema and the schemas that it refers to, by JSON pointer."""

    root: Node
    definitions: dict[str, Node] = field(default_factory=dict)


def parse_schema(schema: Mapping[str, Any], work: Work) -> ParsedSchema:
    """Raises SchemaError."""
    return _Parser(schema, work).parse()


class _Parser:
    def __init__(self, schema: Mapping[str, Any], work: Work) -> None:
        self._schema = schema
        self._work = work
        self._dialect = str(schema.get("$schema", "2020-12"))
        self._resources = _Resources(schema, self._dialect)
        self._definitions: dict[str, Node] = {}
        self._missing: list[tuple[str, str]] = []  # (target, where it is referred to)

    def parse(self) -> ParsedSchema:
        if any(old in self._dialect for old in OLD_DRAFTS):
            raise SchemaError("", f"'$schema' {self._dialect!r} is not supported: drafts 4 to 2020-12 are.")
        root = self._node(self._schema, "")
        while self._missing:
            pointer, referred_at = self._missing.pop()
            if pointer not in self._definitions:
                self._definitions[pointer] = True  # it may refer to itself
                self._definitions[pointer] = self._node(self._target(pointer, referred_at), pointer)
        return ParsedSchema(root, self._definitions)

    def _node(self, schema: Any, pointer: str) -> Node:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError(pointer, "a schema must be an object or a boolean.")
        given = cast("dict[str, Any]", schema)
        self._work.count(0.1)
        node: dict[str, Any] = {"pointer": pointer}
        for key, value in given.items():
            if key in UNSUPPORTED:
                raise SchemaError(pointer, f"'{key}' is not supported.")
            if reader := _READERS.get(key):
                reader(self, node, key, value, pointer)
        if "if" in node and not node.keys() & {"then", "else"}:
            del node["if"]
        if "if" not in node:
            node.pop("then", None)
            node.pop("else", None)
        _adapt_old_keywords(node, given)
        return node

    # one reader for each keyword: it checks the value and writes what it means into `node`

    def _schema_value(self, node: Node, key: str, value: Any, pointer: str) -> None:
        node[key] = self._node(value, f"{pointer}/{key}")

    def _schema_list(self, node: Node, key: str, value: Any, pointer: str) -> None:
        items = _expect(value, list, key, pointer, "an array")
        node[key] = [self._node(item, f"{pointer}/{key}/{i}") for i, item in enumerate(items)]

    def _schema_map(self, node: Node, key: str, value: Any, pointer: str) -> None:
        named = _expect(value, dict, key, pointer, "an object")
        if len(named) > MAX_PROPERTIES:
            raise SchemaError(pointer, f"'{key}' has more than {MAX_PROPERTIES} entries.")
        parsed: dict[str, Node] = {}
        for name, item in named.items():
            at = f"{pointer}/{key}/{_escape(name)}"
            parsed[self._portable(name, at) if key == "patternProperties" else name] = self._node(item, at)
        node[key] = parsed

    def _items(self, node: Node, key: str, value: Any, pointer: str) -> None:
        if isinstance(value, list):
            self._schema_list(node, "items", value, pointer)
            node["prefixItems"] = node.pop("items")
        else:
            self._schema_value(node, key, value, pointer)

    def _dependencies(self, node: Node, key: str, value: Any, pointer: str) -> None:
        found = node.setdefault("dependencies", [])
        for name, wanted in _expect(value, dict, key, pointer, "an object").items():
            at = f"{pointer}/{key}/{_escape(name)}"
            if isinstance(wanted, list):
                names = _strings(wanted, key, pointer)
                if names:
                    found.append((name, {"required": names, "pointer": at}))
            else:
                found.append((name, self._node(wanted, at)))
        if not found:
            del node["dependencies"]

    def _type(self, node: Node, key: str, value: Any, pointer: str) -> None:
        names = _strings(value if isinstance(value, list) else [value], key, pointer)
        unknown = next((name for name in names if name not in TYPES), None)
        if unknown is not None or not names:
            raise SchemaError(pointer, f"'type' must be one of {', '.join(TYPES)}, or several.")
        node[key] = names

    def _enum(self, node: Node, key: str, value: Any, pointer: str) -> None:
        values = _expect(value, list, key, pointer, "an array") if key == "enum" else [value]
        if len(values) > MAX_ENUM:
            raise SchemaError(pointer, f"'enum' has more than {MAX_ENUM} values.")
        if key == "const" and "draft-04" in self._dialect:
            node["newer"] = values  # no evidence for other keywords: validators of draft 4 do not know it
        elif "enum" in node:
            known = {*map(key_of, values)}
            node["enum"] = [item for item in node["enum"] if key_of(item) in known]
        else:
            node["enum"] = values

    def _required(self, node: Node, key: str, value: Any, pointer: str) -> None:
        names = list(dict.fromkeys(_strings(value, key, pointer)))
        if names:
            node[key] = names

    def _count(self, node: Node, key: str, value: Any, pointer: str) -> None:
        number = _number(value, key, pointer)
        if number < 0 or number != int(number):
            raise SchemaError(pointer, f"'{key}' must be a whole number of at least 0.")
        if number < MAX_COUNT:
            node[key] = int(number)
        elif key.startswith("min"):
            raise SchemaError(pointer, f"'{key}' must be less than {MAX_COUNT}.")

    def _bound(self, node: Node, key: str, value: Any, pointer: str) -> None:
        node[key] = value if isinstance(value, bool) and key.startswith("exclusive") else _number(value, key, pointer)

    def _multiple(self, node: Node, key: str, value: Any, pointer: str) -> None:
        number = _number(value, key, pointer)
        if number <= 0:
            raise SchemaError(pointer, "'multipleOf' must be greater than 0.")
        if isinstance(number, float) and Fraction(number) != Fraction(repr(number)):
            reason = (
                f"'multipleOf' {number} is not supported: validators divide in binary, where it has no exact value."
            )
            raise SchemaError(pointer, reason)
        node[key] = int(number) if number == int(number) else number

    def _pattern(self, node: Node, key: str, value: Any, pointer: str) -> None:
        text = _expect(value, str, key, pointer, "a string")
        first, *lookaheads = split_lookaheads(text)
        node[key] = self._portable(first, pointer)
        if lookaheads:
            node["lookaheads"] = [self._portable(lookahead, pointer) for lookahead in lookaheads]
        else:
            node["widest"] = portable(text, widest=True)

    def _portable(self, text: str, pointer: str) -> str:
        """The pattern for the compiler, once it was found to support it."""
        reason = check_pattern(text)
        if reason:
            raise SchemaError(pointer, reason)
        self._work.count(1 + len(text) / PATTERN_CHARACTERS)
        error = syntax_error(portable(text))
        if error and "look" in error and "around" in error:
            raise SchemaError(pointer, "the pattern uses look-around or word boundaries, which are not supported here.")
        if error:
            line = next((line for line in error.splitlines() if line.startswith("error: ")), error.splitlines()[0])
            reason = f"the pattern is not supported: {line.removeprefix('error: ')[:200].rstrip('.')}."
            raise SchemaError(pointer, reason)
        return portable(text)

    def _format(self, node: Node, key: str, value: Any, pointer: str) -> None:
        name = _expect(value, str, key, pointer, "a string")
        if name in FORMATS:  # others are annotations
            node[key] = f"^({FORMATS[name]})$"

    def _unique(self, node: Node, key: str, value: Any, pointer: str) -> None:
        if _expect(value, bool, key, pointer, "a boolean"):
            node[key] = pointer

    def _reference(self, node: Node, key: str, value: Any, pointer: str) -> None:
        reference = _expect(value, str, key, pointer, "a string")
        target = self._resources.resolve(reference, pointer)
        if target is None:
            reason = f"'$ref' {reference!r} is not supported: only references inside of the schema can be resolved."
            raise SchemaError(pointer, reason)
        node[key] = target
        self._missing.append((target, pointer))

    def _target(self, pointer: str, referred_at: str) -> Any:
        value: Any = self._schema
        for step in pointer.split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(value, list) and name.isdigit() and int(name) < len(value):
                value = value[int(name)]
            elif isinstance(value, dict) and name in value:
                value = cast("dict[str, Any]", value)[name]
            else:
                raise SchemaError(referred_at, f"'$ref' names '#{pointer}', which does not exist.")
        return value


_Reader = Callable[[_Parser, Node, str, Any, str], None]
_READERS: dict[str, _Reader] = {
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), _Parser._schema_list),
    **dict.fromkeys(("properties", "patternProperties"), _Parser._schema_map),
    **dict.fromkeys(("additionalProperties", "additionalItems", "propertyNames", "contains"), _Parser._schema_value),
    **dict.fromkeys(("not", "if", "then", "else"), _Parser._schema_value),
    **dict.fromkeys(("dependencies", "dependentRequired", "dependentSchemas"), _Parser._dependencies),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minContains", "minProperties", "maxProperties"),
        _Parser._count,
    ),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _Parser._bound),
    **dict.fromkeys(("enum", "const"), _Parser._enum),
    "items": _Parser._items,
    "type": _Parser._type,
    "required": _Parser._required,
    "multipleOf": _Parser._multiple,
    "pattern": _Parser._pattern,
    "format": _Parser._format,
    "uniqueItems": _Parser._unique,
    "$ref": _Parser._reference,
}


def key_of(value: Any) -> Any:
    """Equal for values that JSON schema calls equal: 1 and 1.0, and not true."""
    if isinstance(value, list):
        return ("array", *map(key_of, value))
    if isinstance(value, dict):
        return ("object", *sorted((name, key_of(item)) for name, item in value.items()))
    return (type(value) is bool, value)


def _expect(value: Any, kind: type, key: str, pointer: str, name: str) -> Any:
    if not isinstance(value, kind):
        raise SchemaError(pointer, f"'{key}' must be {name}.")
    return value


def _strings(value: Any, key: str, pointer: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise SchemaError(pointer, f"'{key}' must be an array of strings.")
    return cast("list[str]", value)


def _number(value: Any, key: str, pointer: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_NUMBER:
        raise SchemaError(pointer, f"'{key}' must be a number.")
    return value


def _adapt_old_keywords(node: Node, given: Mapping[str, Any]) -> None:
    """Draft 4's boolean exclusive bounds, and `additionalItems` behind an array of `items`."""
    for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if node.get(exclusive) is True and inclusive in node:
            node[exclusive] = node.pop(inclusive)
        elif isinstance(node.get(exclusive), bool):
            del node[exclusive]
    additional = node.pop("additionalItems", None)
    if isinstance(given.get("items"), list) and additional is not None:
        node["items"] = additional


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


class _Resources:
    """The identifiers and anchors of a schema."""

    def __init__(self, schema: Any, dialect: str) -> None:
        id_key = "id" if "draft-04" in dialect else "$id"
        is_old = "draft-0" in dialect  # keywords beside a `$ref` are ignored
        self._bases: dict[str, str] = {"": ""}  # JSON pointer of a schema with an identifier -> its URI
        self._pointers: dict[str, str] = {}  # URI, with an anchor as its fragment -> JSON pointer
        stack: list[tuple[str, Any, str]] = [("", schema, "")]
        while stack:
            pointer, value, base = stack.pop()
            if isinstance(value, list):
                stack += [(f"{pointer}/{i}", item, base) for i, item in enumerate(value)]
            if not isinstance(value, dict):
                continue
            name = None if is_old and "$ref" in value else value.get(id_key)
            if isinstance(name, str) and name.startswith("#"):
                self._pointers.setdefault(base + name, pointer)
            elif isinstance(name, str):
                base = self._bases[pointer] = urldefrag(urljoin(base, name))[0]
            self._pointers.setdefault(base, pointer)
            if isinstance(value.get("$anchor"), str):
                self._pointers.setdefault(f"{base}#{value['$anchor']}", pointer)
            stack += [(f"{pointer}/{_escape(key)}", item, base) for key, item in value.items() if key not in VALUES]

    def resolve(self, reference: str, pointer: str) -> str | None:
        """The JSON pointer of what a reference in the schema at `pointer` names; None for another document."""
        while pointer not in self._bases:
            pointer = pointer.rpartition("/")[0]
        base = self._bases[pointer]
        uri, fragment = urldefrag(base + reference if reference.startswith("#") else urljoin(base, reference))
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            return self._pointers.get(f"{uri}#{fragment}")
        return self._pointers[uri] + fragment if uri in self._pointers else None
