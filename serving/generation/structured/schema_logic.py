"""Parsed JSON schemas -> whether a document can satisfy several of them, and schemas that no document of one satisfies.

Both are proofs: what is not known counts as satisfiable, and as having no negation. Formats are no evidence: validators
may ignore them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from serving.generation.structured.patterns import is_unsatisfiable
from serving.generation.structured.schema_parser import TYPES, Node, Work, key_of

STEP = 0.03  # units of work to look at one schema
MAX_STEPS = 12  # of schemas inside of schemas
MAX_ALTERNATIVES = 64  # of the negation of one schema
MAX_NUMBERS = 8  # of an enum that is negated
MAX_TEXTS = 32  # of an enum that is compared with a pattern
MAX_CHARACTERS = 400  # of the texts of an enum that is negated
PATTERN = 2.0  # units of work to compare patterns
ONLY_OBJECTS = {"type": ["object"]}
STRING_KEYWORDS = {"minLength": "minLength", "maxLength": "maxLength", "widest": "pattern"}

Negation = tuple[list[Node], bool]  # alternatives, and whether they are all that there are


class SchemaLogic:
    """Compares schemas. definitions: the targets of references, by JSON pointer."""

    def __init__(self, definitions: dict[str, Node], work: Work) -> None:
        self._definitions = definitions
        self._work = work
        self._keys: dict[int, tuple[list[Any], set[Any]]] = {}  # of enums, by the id of their list

    def atoms(self, nodes: Sequence[Node], depth: int = 0) -> Iterator[Node]:
        """The schemas that hold together, those of `allOf` and `$ref` one by one. Keywords beside a `$ref` are left
        out: validators of draft 7 ignore them."""
        for node in nodes:
            self._work.count(STEP)
            if isinstance(node, bool):
                yield node
            elif "$ref" in node:
                if depth < MAX_STEPS:
                    yield from self.atoms([self._definitions[node["$ref"]]], depth + 1)
            else:
                yield node
                if depth < MAX_STEPS:
                    yield from self.atoms(node.get("allOf", ()), depth + 1)

    def types(self, nodes: Sequence[Node]) -> set[str]:
        """The types that all of them allow. "number" stands for numbers that are no integers."""
        return _types(self._dicts(nodes))

    def accepted_values(self, atoms: Sequence[Node]) -> list[Any] | None:
        """The values of an enum that no schema surely refuses; None if there is no enum."""
        values = min((atom["enum"] for atom in atoms if "enum" in atom), key=len, default=None)
        if values is None:
            return None
        self._work.count(STEP * len(values) * len(atoms) / 8)
        return [value for value in values if all(self._may_accept(atom, value) for atom in atoms)]

    def contains(self, values: list[Any], value: Any) -> bool:
        """Whether an enum has the value. Its keys are kept: enums are compared many times."""
        if id(values) not in self._keys:
            self._keys[id(values)] = (values, set(map(key_of, values)))
        return key_of(value) in self._keys[id(values)][1]

    def _may_accept(self, atom: Node, value: Any) -> bool:
        """False only for a value that the schema surely refuses."""
        kind = type_of(value)
        if "type" in atom and kind not in atom["type"] and not (kind == "integer" and "number" in atom["type"]):
            return False
        if "enum" in atom and not self.contains(atom["enum"], value):
            return False
        if kind == "string":
            is_long_enough = atom.get("minLength", 0) <= len(value) <= atom.get("maxLength", len(value))
            return is_long_enough and value not in atom.get("except", ())
        if kind in ("integer", "number"):
            return bool(
                atom.get("minimum", value) <= value <= atom.get("maximum", value)
                and atom.get("exclusiveMinimum", value - 1) < value < atom.get("exclusiveMaximum", value + 1)
            )
        if kind == "object":
            schemas = [(schema, item) for name, item in value.items() for schema in property_schemas(atom, name)]
            return all(name in value for name in atom.get("required", ())) and all(
                schema is not False and (schema is True or "$ref" in schema or self._may_accept(schema, item))
                for schema, item in schemas
            )
        return True

    def is_empty(self, nodes: Sequence[Node], depth: int = 0) -> bool:
        """Whether no document satisfies all of the schemas."""
        atoms = list(self.atoms(nodes))
        if any(atom is False for atom in atoms):
            return True
        atoms = [atom for atom in atoms if atom is not True]
        types = _types(atoms)
        if not types or self.accepted_values(atoms) == []:
            return True
        if depth >= MAX_STEPS:
            return False
        if types == {"object"} and self._has_impossible_property(atoms, depth):
            return True
        if types <= {"integer", "number"} and is_empty_range(atoms):
            return True
        if types == {"string"} and self._is_impossible_text(atoms):
            return True
        return any(
            all(self.is_empty([option, *atoms], depth + 4) for option in atom[key])
            for atom in atoms
            for key in ("anyOf", "oneOf")
            if key in atom and depth + 4 <= MAX_STEPS
        )

    def tags(self, nodes: Sequence[Node]) -> dict[str, set[Any]]:
        """The enums of required properties, if only objects are allowed: the discriminators of a union."""
        atoms = self._dicts(nodes)
        if _types(atoms) != {"object"}:
            return {}
        required = {name for atom in atoms for name in atom.get("required", ())}
        found: dict[str, set[Any]] = {}
        for name in required:
            values = self.accepted_values(self._dicts([s for atom in atoms for s in property_schemas(atom, name)]))
            if values is not None:
                found[name] = {*map(key_of, values)}
        return found

    def _has_impossible_property(self, atoms: list[Node], depth: int) -> bool:
        required = {name for atom in atoms for name in atom.get("required", ())}
        return any(
            self.is_empty([schema for atom in atoms for schema in property_schemas(atom, name)], depth + 1)
            for name in required
        )

    def _is_impossible_text(self, atoms: list[Node]) -> bool:
        """Whether patterns and lengths, or a few values and patterns, exclude each other."""
        schemas: list[dict[str, object]] = [
            {name: atom[key] for key, name in STRING_KEYWORDS.items() if key in atom} for atom in atoms
        ]
        values = self.accepted_values(atoms)
        schemas = [schema for schema in schemas if schema] + ([{"enum": values}] if values else [])
        if len(schemas) < 2 or len(values or ()) > MAX_TEXTS or not any("pattern" in schema for schema in schemas):
            return False
        self._work.count(PATTERN)
        return is_unsatisfiable(*schemas)

    def negated(self, node: Node, context: Sequence[Node], depth: int = 0) -> Negation:
        """Alternatives that no document of `node` satisfies, for documents that satisfy `context`.

        Those that JSON schema has no keyword for are missing, and those that require a property which `context` does
        not list: a model should not have to invent one.
        """
        if isinstance(node, bool):
            return ([], True) if node else ([True], True)
        if depth > MAX_STEPS:
            return [], False
        if "$ref" in node:
            alternatives, is_exact = self.negated(self._definitions[node["$ref"]], context, depth + 1)
            return alternatives, is_exact and node.keys() <= {"$ref", "pointer"}
        found: list[Node] = []
        is_exact = True
        for key, value in node.items():
            negate = _NEGATIONS.get(key)
            if negate is None:
                is_exact = is_exact and (
                    key in ("pointer", "widest") or (key == "additionalProperties" and is_closed(node))
                )
                continue
            alternatives, all_found = negate(self, value, context, depth)
            found += alternatives
            is_exact = is_exact and all_found
        if is_closed(node):
            alternatives, all_found = self._with_another_property(node, context)
            found += alternatives
            is_exact = is_exact and all_found
        possible = [alternative for alternative in found if not self.is_empty([alternative, *context])]
        if len(possible) > MAX_ALTERNATIVES:
            possible, is_exact = possible[:MAX_ALTERNATIVES], False
        return possible, is_exact

    def _not_type(self, types: Any, context: Sequence[Node], depth: int) -> Negation:
        excluded = {*types, *(["integer"] if "number" in types else ["number"] if "integer" in types else [])}
        rest = [name for name in TYPES if name not in excluded]
        is_exact = "integer" not in types or "number" in types or "number" not in self.types(context)
        return ([{"type": rest}] if rest else []), is_exact

    def _not_values(self, values: Any, context: Sequence[Node], depth: int) -> Negation:
        known = self.accepted_values(self._dicts(context))
        if known is not None:
            rest = [value for value in known if not self.contains(values, value)]
            return ([{"enum": rest}] if rest else []), True
        types = {type_of(value) for value in values}
        excluded = types | ({"integer", "number"} if types & {"integer", "number"} else set())
        found: list[Node] = [{"type": [name for name in TYPES if name not in excluded]}]
        is_exact = not types & {"array", "object"} & self.types(context)
        texts = [value for value in values if isinstance(value, str)]
        if texts and sum(map(len, texts)) <= MAX_CHARACTERS:
            found.append({"type": ["string"], "except": texts})
        elif texts:
            is_exact = False
        if "boolean" in types and len([value for value in values if isinstance(value, bool)]) == 1:
            found.append({"enum": [not next(value for value in values if isinstance(value, bool))]})
        numbers = sorted(value for value in values if type_of(value) in ("integer", "number"))
        if numbers and len(numbers) <= MAX_NUMBERS:
            for low, high in pairwise([None, *numbers, None]):
                bounds = {"exclusiveMinimum": low, "exclusiveMaximum": high}
                found.append({"type": ["number"], **{key: bound for key, bound in bounds.items() if bound is not None}})
        elif numbers:
            is_exact = False
        return [alternative for alternative in found if alternative.get("type") != []], is_exact

    def _not_required(self, names: Any, context: Sequence[Node], depth: int) -> Negation:
        return [{**ONLY_OBJECTS, "properties": {name: False}} for name in names], True

    def _not_properties(self, properties: Any, context: Sequence[Node], depth: int) -> Negation:
        atoms = self._dicts(context)
        found: list[Node] = []
        all_exact = True
        for name, schema in properties.items():
            inner = [item for atom in atoms for item in property_schemas(atom, name)]
            alternatives, is_exact = self.negated(schema, inner, depth + 1)
            if alternatives and any(name in atom.get("properties", ()) for atom in atoms):
                value = alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}
                found.append({**ONLY_OBJECTS, "required": [name], "properties": {name: value}})
                all_exact = all_exact and is_exact
            else:
                all_exact = all_exact and is_exact and not alternatives
        return found, all_exact

    def _with_another_property(self, node: Node, context: Sequence[Node]) -> Negation:
        """Alternatives with a property that `node`, which is closed, does not list, and `context` does."""
        atoms = self._dicts(context)
        listed = list(dict.fromkeys(name for atom in atoms for name in atom.get("properties", ())))
        others = [name for name in listed if name not in node.get("properties", ())]
        is_exact = any(map(is_closed, atoms))
        if others and len(others) == len(listed) and is_exact:
            return [{**ONLY_OBJECTS, "minProperties": 1}], True
        return [{**ONLY_OBJECTS, "required": [name]} for name in others], is_exact

    def _not_items(self, items: Any, context: Sequence[Node], depth: int) -> Negation:
        """Where no item satisfies both, every array but the empty one."""
        first = [schema for atom in self._dicts(context) for schema in item_schemas(atom, 0)]
        if first and self.is_empty([items, *first], depth + 1):
            return [{"type": ["array"], "minItems": 1}], True
        return [], False

    def _not_any(self, options: Any, context: Sequence[Node], depth: int) -> Negation:
        combined: list[list[Node]] = [[]]
        is_exact = True
        for option in options:
            alternatives, all_found = self.negated(option, context, depth + 1)
            is_exact = is_exact and all_found
            combined = [[*some, one] for some in combined for one in alternatives]
            combined = [some for some in combined if len(some) < 2 or not self.is_empty([*some, *context])]
            if len(combined) > MAX_ALTERNATIVES:
                return [], False
        return [some[0] if len(some) == 1 else {"allOf": some} for some in combined], is_exact

    def _not_one(self, options: Any, context: Sequence[Node], depth: int) -> Negation:
        return self._not_any(options, context, depth)[0], False  # what satisfies several is missing

    def _not_all(self, parts: Any, context: Sequence[Node], depth: int) -> Negation:
        negated = [self.negated(part, context, depth + 1) for part in parts]
        return [one for alternatives, _ in negated for one in alternatives], all(is_exact for _, is_exact in negated)

    def _not_not(self, node: Any, context: Sequence[Node], depth: int) -> Negation:
        return [node], True

    def _dicts(self, nodes: Sequence[Node]) -> list[Node]:
        return [atom for atom in self.atoms(nodes) if isinstance(atom, dict)]


def _beyond(kind: str, key: str, step: int = 0) -> Callable[..., Negation]:
    """The negation of a bound is the bound `key` on its other side."""

    def negate(logic: SchemaLogic, value: Any, context: Sequence[Node], depth: int) -> Negation:
        bound = value + step
        return ([{"type": [kind], key: bound}] if step == 0 or bound >= 0 else []), True

    return negate


_NEGATIONS: dict[str, Callable[[SchemaLogic, Any, Sequence[Node], int], Negation]] = {
    "type": SchemaLogic._not_type,
    "enum": SchemaLogic._not_values,
    "required": SchemaLogic._not_required,
    "properties": SchemaLogic._not_properties,
    "anyOf": SchemaLogic._not_any,
    "oneOf": SchemaLogic._not_one,
    "allOf": SchemaLogic._not_all,
    "not": SchemaLogic._not_not,
    "items": SchemaLogic._not_items,
    "minLength": _beyond("string", "maxLength", -1),
    "maxLength": _beyond("string", "minLength", 1),
    "minItems": _beyond("array", "maxItems", -1),
    "maxItems": _beyond("array", "minItems", 1),
    "minimum": _beyond("number", "exclusiveMaximum"),
    "maximum": _beyond("number", "exclusiveMinimum"),
    "exclusiveMinimum": _beyond("number", "maximum"),
    "exclusiveMaximum": _beyond("number", "minimum"),
}


def type_of(value: Any) -> str:
    """The narrowest of TYPES."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return "integer"
    names: dict[type, str] = {float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def are_apart(tags: dict[str, set[Any]], others: dict[str, set[Any]]) -> bool:
    """Whether no object has both tags."""
    return any(name in others and values.isdisjoint(others[name]) for name, values in tags.items())


def property_schemas(atom: Node, name: str) -> list[Node]:
    """What a schema surely says about the value of a property."""
    if name in atom.get("properties", ()):
        return [atom["properties"][name]]
    if "patternProperties" in atom or "additionalProperties" not in atom:
        return []
    return [atom["additionalProperties"]]


def item_schemas(atom: Node, index: int) -> list[Node]:
    """What a schema says about one item of an array."""
    first = atom.get("prefixItems", [])
    if index < len(first):
        return [first[index]]
    return [atom["items"]] if "items" in atom else []


def is_closed(atom: Node) -> bool:
    """Whether an object has no properties but those that the schema lists."""
    return atom.get("additionalProperties") is False and "patternProperties" not in atom


def _types(atoms: Sequence[Node]) -> set[str]:
    allowed = {*TYPES}
    for atom in atoms:
        named = {*atom["type"]} if "type" in atom else {*TYPES}
        if "number" in named:
            named.add("integer")
        if "enum" in atom:
            named &= {type_of(value) for value in atom["enum"]}
        allowed &= named
    return allowed


def is_empty_range(atoms: Sequence[Node]) -> bool:
    low = max((atom[key] for atom in atoms for key in ("minimum", "exclusiveMinimum") if key in atom), default=None)
    high = min((atom[key] for atom in atoms for key in ("maximum", "exclusiveMaximum") if key in atom), default=None)
    if low is None or high is None or low < high:
        return False
    return bool(low > high) or any(
        atom.get("exclusiveMinimum") == low or atom.get("exclusiveMaximum") == high for atom in atoms
    )
