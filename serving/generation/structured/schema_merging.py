"""Several parsed schemas of one value, without alternatives -> one schema for llguidance that has all of their rules.

An object that lists properties and does not say whether others are allowed gets `additionalProperties: false`: a model
that may invent properties does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, permutations
from typing import Any

from serving.generation.structured.patterns import complement, is_unsatisfiable, matches
from serving.generation.structured.schema_logic import STEP, SchemaLogic, is_empty_range, item_schemas
from serving.generation.structured.schema_parser import TYPES, Node, SchemaError, Work, key_of

MAX_ARRAYS = 256  # without repetition, of the values of one enum
MAX_CONTAINED = 16
MATCH = 1.5  # units of work to match a name with a pattern, or to compare two patterns
EVERY_NAME = {"", "^", ".*", "^.*", ".*$", "(.*)", "(?s:.*)"}  # patterns that every name matches

Merged = dict[str, Any] | None  # the keywords of one type; None if no value of that type satisfies all schemas


class SchemaMerger:
    """Merges schemas. value: makes the schema of a property or an item from all that describe it."""

    def __init__(self, logic: SchemaLogic, work: Work, value: Callable[[Sequence[Node]], Node]) -> None:
        self._logic = logic
        self._work = work
        self._value = value
        self.impossible: SchemaError | None = None  # the first schema that no value satisfies

    def merge(self, atoms: Sequence[Node]) -> Node:
        """False if no value satisfies all of `atoms`. Raises SchemaError for keywords that llguidance lacks."""
        self._work.count(STEP * (5 + 2 * len(atoms)))
        types, values = self._logic.types(atoms), self._logic.accepted_values(atoms)
        is_unique = any("uniqueItems" in atom for atom in atoms)
        if values is not None and is_unique:
            values = [value for value in values if not isinstance(value, list) or _is_unique(value)]
        if not types or values == []:
            self._explain(atoms, "its types and values leave none")
            return False
        if is_unique and values is None and {"array"} < types:
            kinds = [{"type": ["array"]}, {"type": sorted(types - {"array"})}]
            return any_of([node for kind in kinds if (node := self.merge([*atoms, kind])) is not False])
        names = [name for name in TYPES if name in types and not (name == "integer" and "number" in types)]
        out: dict[str, Any] = {}
        if len(names) < len(TYPES) - 1:
            out["type"] = names[0] if len(names) == 1 else names
        if values is not None:
            out["enum"] = values
        extra: list[Node] = []
        for kinds_of, merge in _MERGERS.items():
            if types.isdisjoint(kinds_of):
                continue
            merged = merge(self, atoms)
            if merged is None:
                rest = [name for name in names if name not in kinds_of]
                return self.merge([*atoms, {"type": rest}]) if rest else False
            extra += merged.pop("allOf", ())
            out |= merged
        return {**out, "allOf": extra} if extra else out

    def _explain(self, atoms: Sequence[Node], reason: str) -> None:
        """Keeps the first reason, for the error message if the whole schema turns out to be impossible."""
        self.impossible = self.impossible or SchemaError(pointer_of(atoms), f"no value satisfies it: {reason}.")

    def _number(self, atoms: Sequence[Node]) -> Merged:
        if is_empty_range(atoms):
            self._explain(atoms, "'minimum' is greater than 'maximum'")
            return None
        out = _extremes(atoms, largest=("minimum", "exclusiveMinimum"), smallest=("maximum", "exclusiveMaximum"))
        multiples = [atom["multipleOf"] for atom in atoms if "multipleOf" in atom]
        if multiples and all(isinstance(multiple, int) for multiple in multiples):
            return {**out, "multipleOf": math.lcm(*multiples)}
        return {**out, "allOf": [{"multipleOf": multiple} for multiple in multiples]}

    def _string(self, atoms: Sequence[Node]) -> Merged:
        out = _extremes(atoms, largest=("minLength",), smallest=("maxLength",))
        if out.get("minLength", 0) > out.get("maxLength", math.inf):
            self._explain(atoms, "'minLength' is greater than 'maxLength'")
            return None
        patterns = [atom[key] for atom in atoms for key in ("pattern", "format") if key in atom]
        patterns += [pattern for atom in atoms for pattern in atom.get("lookaheads", ())]
        if excluded := [text for atom in atoms for text in atom.get("except", ())]:
            patterns.append(complement(excluded))
        if patterns:
            out["pattern"], *others = dict.fromkeys(patterns)
            out["allOf"] = [{"pattern": pattern} for pattern in others]
        return out

    def _array(self, atoms: Sequence[Node]) -> Merged:
        out = _extremes(atoms, largest=("minItems",), smallest=("maxItems",))
        items = self._value([atom["items"] for atom in atoms if "items" in atom])
        first: list[Node] = []
        contained = self._contained(atoms)
        if contained:
            out["minItems"] = max(len(contained), out.get("minItems", 0))
        for index in range(max(len(contained), *(len(atom.get("prefixItems", ())) for atom in atoms))):
            schemas = [schema for atom in atoms for schema in item_schemas(atom, index)]
            item = self._value(schemas + contained[index : index + 1])
            if item is False:
                items = False
                break
            first.append(item)
        if items is False:
            out["maxItems"] = min(len(first), out.get("maxItems", len(first)))
        if out.get("minItems", 0) > out.get("maxItems", math.inf):
            self._explain(atoms, "'minItems' is greater than 'maxItems', or than the number of items that are possible")
            return None
        unique = next((atom["uniqueItems"] for atom in atoms if "uniqueItems" in atom), None)
        if unique is not None and out.get("maxItems", 2) > 1 and not any("enum" in atom for atom in atoms):
            return {"enum": self._unique_arrays(atoms, out, unique)}
        if first:
            out["prefixItems"] = first
        return out if items is True else {**out, "items": items}

    def _contained(self, atoms: Sequence[Node]) -> list[Node]:
        """What the first items are, so that the array contains what it has to."""
        found: list[Node] = []
        for atom in [atom for atom in atoms if "contains" in atom]:
            least = atom.get("minContains", 1)
            if least > MAX_CONTAINED:
                raise SchemaError(pointer_of(atoms), f"'minContains' greater than {MAX_CONTAINED} is not supported.")
            found += [atom["contains"]] * least
        return found

    def _unique_arrays(self, atoms: Sequence[Node], counts: dict[str, Any], pointer: str) -> list[list[Any]]:
        """All arrays of a few values without repetition, in any order; if these are too many, in the enum's order."""
        items = [item for atom in atoms for item in item_schemas(atom, 0)]
        rules = [atom for atom in self._logic.atoms(items) if isinstance(atom, dict)]
        is_plain = all(atom.keys() <= {"enum", "type", "pointer"} for atom in rules)
        values = self._logic.accepted_values(rules) if is_plain else None
        if values is None or any(atom.keys() & {"prefixItems", "contains"} for atom in atoms):
            raise SchemaError(pointer, "'uniqueItems' is supported for items with a short 'enum' only.")
        sizes = range(counts.get("minItems", 0), min(counts.get("maxItems", len(values)), len(values)) + 1)
        for choose, count in ((permutations, math.perm), (combinations, math.comb)):
            if sum(count(len(values), size) for size in sizes) <= MAX_ARRAYS:
                return [list(array) for size in sizes for array in choose(values, size)]
        raise SchemaError(pointer, f"'uniqueItems' is supported for enums of at most {MAX_ARRAYS} such arrays.")

    def _object(self, atoms: Sequence[Node]) -> Merged:
        out = _extremes(atoms, largest=("minProperties",), smallest=("maxProperties",))
        required = list(dict.fromkeys(name for atom in atoms for name in atom.get("required", ())))
        names = list(dict.fromkeys(name for atom in atoms for name in atom.get("properties", ())))
        self._work.count(STEP * len(names) * len(atoms) / 4)
        properties = {name: self._value([s for atom in atoms for s in self._named(atom, name)]) for name in names}
        forbidden = next((name for name in required if properties.get(name) is False), None)
        if forbidden is not None:
            self._explain(atoms, f"the required property '{forbidden}' allows no value")
            return None
        by_pattern = _by_pattern(atoms)
        additional = [schema for atom in atoms for schema in _unlisted(atom)]
        lists_properties = any(schema is not False for schema in properties.values()) or any(
            atom.get("properties") == {} for atom in atoms
        )
        if additional:
            out["additionalProperties"] = self._value(additional)
        elif lists_properties and not by_pattern and properties.keys() >= {*required}:
            out["additionalProperties"] = False
        if by_pattern:
            self._check_patterns(list(by_pattern), atoms)
            out["patternProperties"] = {pattern: self._value(schemas) for pattern, schemas in by_pattern.items()}
        if properties:
            out["properties"] = properties
        if required:
            out["required"] = required
        return _counted(out, pointer_of(atoms))

    def _named(self, atom: Node, name: str) -> Iterator[Node]:
        """What one schema says about a property that any of the schemas lists."""
        is_known = name in atom.get("properties", ())
        if is_known:
            yield atom["properties"][name]
        for pattern, schema in atom.get("patternProperties", {}).items():
            self._work.count(MATCH)
            if matches(pattern, name):
                is_known = True
                yield schema
        if not is_known:
            yield atom.get("additionalProperties", True)

    def _check_patterns(self, patterns: list[str], atoms: Sequence[Node]) -> None:
        """llguidance needs patterns of names that exclude each other."""
        for one, other in combinations(patterns, 2):
            self._work.count(MATCH)
            if not is_unsatisfiable({"pattern": one}, {"pattern": other}):
                reason = f"'patternProperties' must exclude each other; a name may match {one!r} and {other!r}."
                raise SchemaError(pointer_of(atoms), reason)


_MERGERS: dict[tuple[str, ...], Callable[[SchemaMerger, Sequence[Node]], Merged]] = {
    ("integer", "number"): SchemaMerger._number,
    ("string",): SchemaMerger._string,
    ("array",): SchemaMerger._array,
    ("object",): SchemaMerger._object,
}


def any_of(alternatives: Sequence[Node]) -> Node:
    if not alternatives or any(alternative is True for alternative in alternatives):
        return bool(alternatives)
    return alternatives[0] if len(alternatives) == 1 else {"anyOf": [*alternatives]}


def pointer_of(atoms: Sequence[Node]) -> str:
    """The JSON pointer of the first schema that the client wrote."""
    return next((atom["pointer"] for atom in atoms if isinstance(atom, dict) and "pointer" in atom), "")


def _by_pattern(atoms: Sequence[Node]) -> dict[str, list[Node]]:
    """For each pattern of names all that the schemas say about properties that match it and are not listed."""
    found: dict[str, list[Node]] = {}
    for atom in atoms:
        for pattern, schema in atom.get("patternProperties", {}).items():
            if pattern not in EVERY_NAME:
                others = [item for other in atoms if other is not atom for item in _unlisted(other)]
                found.setdefault(pattern, []).extend([schema, *_for_every_name(atom), *others])
    return found


def _for_every_name(atom: Node) -> list[Node]:
    return [schema for pattern, schema in atom.get("patternProperties", {}).items() if pattern in EVERY_NAME]


def _unlisted(atom: Node) -> list[Node]:
    """What a schema says about properties that it does not list and that match none of its patterns."""
    return _for_every_name(atom) or ([atom["additionalProperties"]] if "additionalProperties" in atom else [])


def _extremes(atoms: Sequence[Node], largest: Sequence[str], smallest: Sequence[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key in (*largest, *smallest):
        values = [atom[key] for atom in atoms if key in atom]
        if values:
            out[key] = max(values) if key in largest else min(values)
    return out


def _counted(out: dict[str, Any], pointer: str) -> Merged:
    """The object with counts of properties that llguidance supports, or None if no object has that many.

    It counts in objects whose listed properties are all required, and in closed objects up to one more than required.
    """
    required, properties = out.get("required", []), out.get("properties", {})
    num_required, num_listed = len(required), sum(schema is not False for schema in properties.values())
    has_optional = any(name not in required and schema is not False for name, schema in properties.items())
    is_closed = out.get("additionalProperties") is False and "patternProperties" not in out
    least, most = out.get("minProperties", 0), out.get("maxProperties")
    if max(least, num_required) > (math.inf if most is None else most) or (is_closed and least > num_listed):
        return None
    if most == num_required and all(name in properties for name in required):
        named = {name: properties[name] for name in required}
        return {"properties": named, "required": required, "additionalProperties": False}
    if least <= num_required:
        out.pop("minProperties", None)
    if has_optional and out.keys() & {"minProperties", "maxProperties"} and num_listed >= least:
        out.pop("patternProperties", None)
        out["additionalProperties"], is_closed = False, True
    if most is not None and is_closed and most >= num_listed:
        del out["maxProperties"]
    if not is_closed and least > num_required + 1:  # llguidance counts a name twice that the model writes twice
        raise SchemaError(pointer, "'minProperties' greater than 1 is not supported where the names are not listed.")
    for key in ("minProperties", "maxProperties"):
        if has_optional and out.get(key, num_required + 1) != num_required + 1:
            raise SchemaError(pointer, f"this '{key}' is not supported where listed properties may be left out.")
    return out


def _is_unique(values: list[Any]) -> bool:
    return len({*map(key_of, values)}) == len(values)
