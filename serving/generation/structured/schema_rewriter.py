"""Parsed JSON schemas -> one schema in the keywords that a grammar has, each object closed.

`oneOf`, `not`, `if`, `dependencies` and `propertyNames` become alternatives (`anyOf`). Each alternative is merged with
the schemas that describe the same value (`allOf`, `$ref`, keywords beside it). The result accepts the same documents,
or fewer where JSON schema has no keyword for the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from serving.generation.structured.schema_logic import Negation, SchemaLogic, are_apart
from serving.generation.structured.schema_merging import SchemaMerger, any_of, pointer_of
from serving.generation.structured.schema_parser import TYPES, Node, ParsedSchema, SchemaError, Work

MAX_ALTERNATIVES = 128  # of one value
MAX_PENDING = 100  # keywords of one value that become alternatives
MAX_LEVELS = 20  # of schemas inside of schemas; deeper ones become definitions
LARGE = {"properties", "items", "prefixItems", "anyOf", "additionalProperties", "patternProperties"}

Pending = list[tuple[str, Node]]  # keywords that become alternatives, each with its schema


def rewrite(parsed: ParsedSchema, work: Work) -> dict[str, Any]:
    """The schema for llguidance. Raises SchemaError."""
    return _Rewriter(parsed, work).rewrite()


class _Rewriter:
    def __init__(self, parsed: ParsedSchema, work: Work) -> None:
        self._parsed = parsed
        self._logic = SchemaLogic(parsed.definitions, work)
        self._merger = SchemaMerger(self._logic, work, self._value)
        self._names: dict[frozenset[str], str] = {}  # of definitions, by the keys of the schemas merged in them
        self._queue: list[tuple[str, list[Node]]] = []
        self._seen: dict[frozenset[str], Node] = {}
        self._definitions: dict[str, Node] = {}
        self._level = 0

    def rewrite(self) -> dict[str, Any]:
        root = self._value([self._parsed.root])
        while self._queue:
            name, parts = self._queue.pop()
            self._definitions[name] = self._expanded(parts)
        while impossible := {name for name, node in self._definitions.items() if node is False}:
            root = _without(root, impossible)
            kept = {name: node for name, node in self._definitions.items() if name not in impossible}
            self._definitions = {name: _without(node, impossible) for name, node in kept.items()}
        if root is False:
            raise self._merger.impossible or SchemaError("", "no document satisfies it.")
        schema = {} if root is True else root
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _value(self, parts: Sequence[Node]) -> Node:
        """The one schema for a value that all of `parts` describe."""
        resolved: dict[str, Node] = {}
        has_reference = False
        for part in parts:
            while isinstance(part, dict) and "$ref" in part and part.keys() <= {"$ref", "pointer"}:
                part = self._parsed.definitions[part["$ref"]]
                has_reference = True
            if part is False:
                return False
            if part is not True:
                resolved[_key(part)] = part
                has_reference = has_reference or _has_reference(part)
        if not resolved:
            return True
        key = frozenset(resolved)
        if key not in self._names and (has_reference or self._level >= MAX_LEVELS):
            self._queue.append((self._new_name(key), [*resolved.values()]))
        if key not in self._names and key in self._seen:
            self._definitions[self._new_name(key)] = self._seen[key]
        if key in self._names:
            return {"$ref": f"#/$defs/{self._names[key]}"}
        self._level += 1
        node = self._expanded([*resolved.values()])
        self._level -= 1
        if isinstance(node, dict) and node.keys() & LARGE:
            self._seen[key] = node
        return node

    def _new_name(self, key: frozenset[str]) -> str:
        last = min(key).rpartition("/")[2]
        self._names[key] = f"{''.join(c for c in last if c.isalnum())[:30]}_{len(self._names)}"
        return self._names[key]

    def _expanded(self, parts: Sequence[Node]) -> Node:
        found: list[Node] = []
        self._expand(*_split(self._parsed, parts), found)
        return any_of(found)

    def _expand(self, atoms: list[Node], pending: Pending, found: list[Node]) -> None:
        """Adds an alternative to `found` for each way to satisfy `atoms` and `pending`."""
        if len(found) > MAX_ALTERNATIVES or len(pending) > MAX_PENDING:
            what = f"'{pending[0][0]}' leads" if pending else "it leads"
            raise SchemaError(pointer_of(atoms), f"{what} to more than {MAX_ALTERNATIVES} combined alternatives.")
        if False in atoms:
            return
        if not pending:
            merged = self._merger.merge(atoms)
            if merged is not False and merged not in found:
                found.append(merged)
            return
        (keyword, node), *rest = pending
        for option in _RULES[keyword](self, node, atoms):
            more_atoms, more_pending = _split(self._parsed, [option])
            around = [*atoms, *more_atoms]
            if self._logic.is_empty(around):
                continue
            if not rest and self._adds_nothing(atoms, option):
                value = self._value([option])
                found += [] if value is False else [value]
            else:
                self._expand(around, [*more_pending, *rest], found)

    def _adds_nothing(self, atoms: list[Node], option: Node) -> bool:
        """Whether `option` alone says what it says together with `atoms`."""
        return all(atom.keys() <= {"type", "pointer"} for atom in atoms) and (
            self._logic.types([option]) <= self._logic.types(atoms)
        )

    # the rules: each returns the alternatives of a keyword, where `context` holds

    def _any_of(self, node: Node, context: Sequence[Node]) -> list[Node]:
        return list(node["anyOf"])

    def _one_of(self, node: Node, context: Sequence[Node]) -> list[Node]:
        """Each alternative together with what excludes the others that might hold as well."""
        options: list[Node] = node["oneOf"]
        tags = [self._logic.tags([option, *context]) for option in options]
        chosen: list[Node] = []
        for i, option in enumerate(options):
            if self._logic.is_empty([option, *context]):
                continue
            parts = [option]
            for j, other in enumerate(options):
                if i == j or are_apart(tags[i], tags[j]) or self._logic.is_empty([option, other, *context]):
                    continue
                excluding, is_exact = self._excluding(other, [option, *context])
                if not excluding and is_exact:
                    break  # every document of this alternative satisfies the other one, too
                if not excluding:
                    reason = "'oneOf' is supported for alternatives that exclude each other"
                    both = f"{min(i, j)} and {max(i, j)} may hold together"
                    raise SchemaError(node["pointer"], f"{reason}; {both}.")
                parts.append(any_of(excluding))
            else:
                chosen.append(all_of(parts))
        return chosen

    def _excluding(self, other: Node, context: Sequence[Node]) -> Negation:
        """The negation of `other`, for the types of which a value may satisfy `other` and `context`."""
        types = self._logic.types(context)
        apart = [kind for kind in types if self._logic.is_empty([other, *context, {"type": [kind]}])]
        if not apart or len(apart) == len(types):
            return self._logic.negated(other, context)
        excluding, is_exact = self._logic.negated(other, [*context, {"type": sorted(types.difference(apart))}])
        return [{"type": sorted(apart)}, *excluding], is_exact

    def _not(self, node: Node, context: Sequence[Node]) -> list[Node]:
        excluding, is_exact = self._logic.negated(node["not"], context)
        if excluding or is_exact:
            return excluding
        raise SchemaError(node["pointer"], "'not' is supported for types, values, bounds and properties only.")

    def _if(self, node: Node, context: Sequence[Node]) -> list[Node]:
        condition, then, other = node["if"], node.get("then", True), node.get("else", True)
        if self._logic.is_empty([condition, *context]):
            return [other]
        excluding, is_exact = self._logic.negated(condition, context)
        chosen = [all_of([condition, then]), *(all_of([alternative, other]) for alternative in excluding)]
        if not excluding and not is_exact:  # documents that satisfy both branches satisfy `if` in any case
            chosen.append(all_of([then, other]))
        return chosen

    def _dependency(self, node: Node, context: Sequence[Node]) -> list[Node]:
        names, wanted = node["dependency"]
        required = {
            name for atom in self._logic.atoms(context) if isinstance(atom, dict) for name in atom.get("required", ())
        }
        return [wanted] if required & {*names} else [{"properties": dict.fromkeys(names, False)}, wanted]

    def _property_names(self, node: Node, context: Sequence[Node]) -> list[Node]:
        """A pattern, an enum or lengths of names become properties of these names."""
        rules = [atom for atom in self._logic.atoms([node["propertyNames"]]) if atom is not True]
        if any(rule is False or "string" not in rule.get("type", ["string"]) for rule in rules):
            return [{"type": ["object"], "maxProperties": 0}, {"type": [name for name in TYPES if name != "object"]}]
        given = {key for rule in rules for key in rule} - {"type", "widest", "pointer"}
        if not given:
            return [True]
        if len(rules) > 1 or not (given == {"enum"} or given == {"pattern"} or given <= {"minLength", "maxLength"}):
            raise SchemaError(node["pointer"], "'propertyNames' is supported with a pattern, an enum or lengths.")
        (rule,) = rules
        if given == {"enum"}:
            names = [name for name in rule["enum"] if isinstance(name, str)]
            return [{"properties": dict.fromkeys(names, True), "additionalProperties": False}]
        pattern = rule.get("pattern") or f"^(?s:.{{{rule.get('minLength', 0)},{rule.get('maxLength', '')}}})$"
        return [{"patternProperties": {pattern: True}, "additionalProperties": False}]


_RULES: dict[str, Callable[[_Rewriter, Node, Sequence[Node]], list[Node]]] = {
    "anyOf": _Rewriter._any_of,
    "not": _Rewriter._not,
    "propertyNames": _Rewriter._property_names,
    "dependency": _Rewriter._dependency,
    "if": _Rewriter._if,
    "oneOf": _Rewriter._one_of,
}


def all_of(parts: Sequence[Node]) -> Node:
    parts = [part for part in parts if part is not True]
    if not parts:
        return True
    return parts[0] if len(parts) == 1 else {"allOf": parts}


def _split(parsed: ParsedSchema, parts: Sequence[Node]) -> tuple[list[Node], Pending]:
    """The schemas that hold together, without `allOf` and `$ref`, and their keywords that become alternatives."""
    atoms: list[Node] = []
    pending: Pending = []
    followed: set[str] = set()

    def split(node: Node) -> None:
        if isinstance(node, bool):
            atoms.extend([] if node else [node])
            return
        keys = list(node)
        simple = {key: value for key, value in node.items() if key not in NOT_SIMPLE}
        position = keys.index("properties") if "properties" in keys else len(keys)
        for key in [*keys[:position], None, *keys[position:]]:
            if key is None:
                atoms.append(simple)
            elif key == "$ref" and node[key] not in followed:
                followed.add(node[key])
                split(parsed.definitions[node[key]])
            elif key == "allOf":
                for item in node[key]:
                    split(item)
            elif key == "newer":
                atoms.append({"enum": node[key]})
            elif key == "dependencies":
                pending.extend(("dependency", {"dependency": group}) for group in _grouped(node[key]))
            elif key in _RULES:
                pending.append((key, node))

    for part in parts:
        split(part)
    order = list(_RULES)
    pending.sort(key=lambda item: order.index(item[0]))
    return atoms, pending


NOT_SIMPLE = {"$ref", "allOf", "newer", "dependencies", "then", "else", *_RULES}


def _grouped(dependencies: list[tuple[str, Node]]) -> list[tuple[list[str], Node]]:
    """(properties, what each of them requires): properties with the same requirement share its alternatives."""
    groups: dict[Any, tuple[list[str], Node]] = {}
    for name, wanted in dependencies:
        is_list = isinstance(wanted, dict) and wanted.keys() == {"required", "pointer"}
        same = tuple(wanted["required"]) if is_list else (name, id(wanted))
        groups.setdefault(same, ([], wanted))[0].append(name)
    return list(groups.values())


def _without(node: Node, impossible: set[str]) -> Node:
    """The schema, with references to definitions that no value satisfies replaced by False."""
    if not isinstance(node, dict):
        return node
    if node.get("$ref", "").removeprefix("#/$defs/") in impossible:
        return False
    out = dict(node)
    for key in ("properties", "patternProperties"):
        if key in node:
            out[key] = {name: _without(item, impossible) for name, item in node[key].items()}
    for key in ("items", "additionalProperties"):
        if key in node:
            out[key] = _without(node[key], impossible)
    for key in ("anyOf", "prefixItems"):
        if key in node:
            out[key] = [_without(item, impossible) for item in node[key]]
    if any(out.get("properties", {}).get(name) is False for name in out.get("required", ())):
        return False
    if "anyOf" in out:
        return any_of([item for item in out["anyOf"] if item is not False])
    return out


def _key(node: Node) -> str:
    return node["pointer"] if "pointer" in node else json.dumps(node)


def _has_reference(node: Node) -> bool:
    """Whether merging the schema follows a reference, and may come back to it."""
    if isinstance(node, list):
        return any(map(_has_reference, node))
    if not isinstance(node, dict):
        return False
    return "$ref" in node or any(_has_reference(node[key]) for key in NOT_SIMPLE & node.keys())
