"""Regular expressions and formats of JSON schemas -> patterns that mean the same in every regular-expression engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import llguidance

MAX_REPEATS = 5000  # product of nested bounds in a pattern
MAX_PATTERN = 5000  # characters

_ATOM = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]", re.DOTALL)
_ATOM_OR_CHARACTER = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|.", re.DOTALL)
_GROUP = re.compile(r"\((?:\?:)?((?:[^()\\]|\\.)*)\)(\$?)")
_LITERAL = re.compile(r"(?:[\w\s/@:,;=!<>%&#\"'~`-]|\\[^\w\s])+")
_CLASS = re.compile(r"\\.", re.DOTALL)
_REPEAT = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\((?:\?[^()]*?:)?|\)|\{(\d{1,9})(?:,(\d{0,9}))?\}", re.DOTALL)
# the fewest characters that any regular-expression engine means by a class, and the most
_FEWEST = {r"\d": "0-9", r"\w": r"0-9A-Za-z_\x{4E00}-\x{9FFF}", r"\s": r" \t\n\r"}
_MOST = {r"\d": r"\p{N}", r"\w": r"\p{L}\p{M}\p{N}_", r"\s": r"\s\x{1C}-\x{1F}\x{FEFF}"}
_INSIDE = _FEWEST | {name.upper(): f"[^{text}]" for name, text in _MOST.items()}
_INSIDE_NEGATED = _MOST | {name.upper(): f"[^{text}]" for name, text in _FEWEST.items()}

_MONTH_DAY = "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
_DAY = rf"([12][0-9]{{3}}-{_MONTH_DAY}|[12][0-9](0[48]|[2468][048]|[13579][26])-02-29)"
_CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = r"[a-zA-Z0-9]{1,15}(-[a-zA-Z0-9]{1,15}){0,2}"
_HOST = rf"{_LABEL}(\.{_LABEL}){{0,4}}"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HEX = r"[0-9a-fA-F]{1,4}"
_UP_TO_7 = "|".join(rf"({_HEX}:){{{n}}}(:{_HEX}){{1,{7 - n}}}" for n in range(1, 7))
_PATH = r"[a-zA-Z0-9_~!$&'()*+,;=@/.-]"
_TAIL = rf"(\?({_PATH}|[?:])*)?(#({_PATH}|[?:])*)?"
_URI = rf"[a-zA-Z][a-zA-Z0-9+.-]{{0,30}}:(//{_HOST}(:[0-9]{{1,4}})?(/{_PATH}*)?|[a-zA-Z0-9]{_PATH}*){_TAIL}"
_RELATIVE = rf"/?[a-zA-Z0-9_~.-]{_PATH}*{_TAIL}"
_MAIL = rf"[a-zA-Z0-9_+-]{{1,20}}(\.[a-zA-Z0-9_+-]{{1,20}}){{0,2}}@{_HOST}"
_POINTER = r"(/([^~/\x00-\x1F\x7F]|~[01])*)*"
_DATE_PART = r"([0-9]{1,4}Y([0-9]{1,4}M([0-9]{1,4}D)?)?|[0-9]{1,4}M([0-9]{1,4}D)?|[0-9]{1,4}D)"
_TIME_PART = r"T([0-9]{1,4}H([0-9]{1,4}M([0-9]{1,4}S)?)?|[0-9]{1,4}M([0-9]{1,4}S)?|[0-9]{1,4}S)"
_REGEX_ATOM = r"([a-zA-Z0-9 _@%&#:;,=!<>/-]|\\[dDwWsS.()+*?/|-]|\.|\[\^?([a-zA-Z0-9_ ]|a-z|A-Z|0-9)+\])"
_REGEX_BRANCH = rf"({_REGEX_ATOM}([*+?]|\{{[1-9]\}})?)+"
# The texts that validators agree on, not all that the RFCs allow. Formats of draft 2020-12, and their earlier names.
FORMATS = {
    "date": _DAY,
    "time": _CLOCK,
    "date-time": f"{_DAY}T{_CLOCK}",
    "duration": rf"P({_DATE_PART}({_TIME_PART})?|{_TIME_PART}|[0-9]{{1,4}}W)",
    "email": _MAIL,
    "idn-email": _MAIL,
    "hostname": _HOST,
    "idn-hostname": _HOST,
    "host-name": _HOST,
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "ip-address": rf"({_BYTE}\.){{3}}{_BYTE}",
    "ipv6": rf"(({_HEX}:){{7}}{_HEX}|{_UP_TO_7}|:(:{_HEX}){{1,7}}|({_HEX}:){{1,7}}:|::)",
    "uri": _URI,
    "iri": _URI,
    "uri-reference": f"({_URI}|{_RELATIVE})",
    "iri-reference": f"({_URI}|{_RELATIVE})",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "uri-template": rf"({_URI}|{_RELATIVE}|/)(/?\{{[a-zA-Z_][a-zA-Z0-9_]*\}})*",
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(0|[1-9][1-9]?)(#|{_POINTER})",
    "regex": rf"\^?({_REGEX_BRANCH}|\({_REGEX_BRANCH}(\|{_REGEX_BRANCH})*\)[*+?]?)+\$?",
    "color": r"#[0-9a-fA-F]{6}",
}


def portable(pattern: str, widest: bool = False) -> str:
    """The pattern with \\d, \\w and \\s as the characters that regular-expression engines agree on, and \\D, \\W and
    \\S as those that none of them excludes. Their meaning depends on the Unicode version, or on ASCII.

    widest: the opposite, every text that some engine accepts.
    """
    inside, negated = (_INSIDE_NEGATED, _INSIDE) if widest else (_INSIDE, _INSIDE_NEGATED)

    def replaced(found: re.Match[str]) -> str:
        text = found.group()
        if text.startswith("["):
            classes = negated if text.startswith("[^") else inside
            return _CLASS.sub(lambda inner: classes.get(inner.group(), inner.group()), text)
        characters = inside.get(text, text)
        return characters if text not in inside or characters.startswith("[^") else f"[{characters}]"

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


@lru_cache(maxsize=1024)
def syntax_error(pattern: str) -> str | None:
    """llguidance's error message for a pattern of a JSON schema; None if it compiles."""
    error = _error({"type": "string", "pattern": pattern})
    return None if not error or "Unsatisfiable" in error else error


def matches(pattern: str, text: str) -> bool:
    """Whether a pattern of a JSON schema matches somewhere in the text."""
    return not is_unsatisfiable({"enum": [text]}, {"pattern": pattern})


def is_unsatisfiable(*schemas: dict[str, object]) -> bool:
    """Whether no string satisfies all of these schemas, which have string keywords only."""
    return "Unsatisfiable" in _error({"type": "string", "allOf": [*schemas]})


def _error(schema: dict[str, object]) -> str:
    return str(llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))))


def split_lookaheads(pattern: str) -> list[str]:
    """Patterns that together mean what a pattern with lookaheads at its beginning means; [pattern] if it has none.

    `^(?=a)b` becomes `^b` and `^a`; `^(?!a|b)c`, with literal texts a and b, becomes `^c` and a pattern of what begins
    with neither of them.
    """
    found: list[str] = []
    rest = pattern.removeprefix("^")
    while pattern.startswith("^") and rest.startswith(("(?=", "(?!")):
        end, has_branches = _group_end(rest)
        inner = rest[3:end]
        lookahead = f"^(?:{inner})" if rest.startswith("(?=") else _negative_lookahead(inner)
        if end < 0 or has_branches or lookahead is None:
            return [pattern]
        found.append(lookahead)
        rest = rest[end + 1 :]
    return [f"^{rest}", *found] if found else [pattern]


def _group_end(pattern: str) -> tuple[int, bool]:
    """(end of the group that the pattern begins with, or -1; whether there are branches outside of groups)."""
    depth = position = 0
    end, has_branches = -1, False
    for atom in _ATOM_OR_CHARACTER.findall(pattern):
        depth += (atom == "(") - (atom == ")")
        has_branches = has_branches or (depth == 0 and atom == "|")
        if depth == 0 and end < 0:
            end = position
        position += len(atom)
    return end, has_branches


def _negative_lookahead(inner: str) -> str | None:
    """A pattern of the texts at whose beginning none of the literal branches matches; None for other branches."""
    group = _GROUP.fullmatch(inner)
    texts, is_whole = (group[1].split("|"), bool(group[2])) if group else (inner.split("|"), False)
    whole, prefixes = list[str](), list[str]()
    for text in texts:
        literal = text.removesuffix("$")
        if not _LITERAL.fullmatch(literal):
            return None
        plain = re.sub(r"\\(.)", r"\1", literal)
        if is_whole or literal != text:
            whole += [plain, f"{plain}\n"]  # Python's `$` matches in front of a last line break, too
        else:
            prefixes.append(plain)
    return complement(whole, prefixes)


def complement(texts: Iterable[str], prefixes: Iterable[str] = ()) -> str:
    """A pattern that every text matches but these, and but those that begin with one of the prefixes."""
    tree: dict[str, Any] = {}
    for text, kind in [*((text, "") for text in texts), *((text, "prefix") for text in prefixes)]:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[kind] = {}
    return f"^({_complement(tree)})$"


def _complement(tree: dict[str, Any]) -> str:
    """What may follow a prefix of excluded texts: nothing if it is none itself, another character, or another rest."""
    characters = sorted(character for character in tree if len(character) == 1)
    excluded = "".join(f"\\x{{{ord(c):X}}}" for c in characters)
    branches = [] if "" in tree else [""]
    branches.append(rf"(?s:[^{excluded}].*)" if excluded else "(?s:.+)")
    branches += [rf"\x{{{ord(c):X}}}({_complement(tree[c])})" for c in characters if "prefix" not in tree[c]]
    return "|".join(branches)
