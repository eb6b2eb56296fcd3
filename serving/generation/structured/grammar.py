"""JSON schemas, regular expressions, choices and tools -> the text of a grammar in llguidance's Lark dialect.

Every grammar allows one space in front of the answer: many tokenizers put one in front of the first word, and decoding
drops it. `ConstrainedText` removes it, and the rest matches the constraint.

Source: llguidance docs/syntax.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serving.generation.interface import PromptError, Tool, ToolSyntax
from serving.generation.structured.json_schema import supported_schema
from serving.generation.structured.patterns import check_pattern, portable
from serving.generation.structured.schema_parser import Work

MAX_CALLS = 16  # of one answer
MAX_CHOICES = 2000
HEADER = '%llguidance {"no_forcing": true}\n'  # every tokenization of a text may be sampled
# White space between the parts of a document: an optional space behind commas and colons. A general pattern for white
# space (`whitespace_pattern`) may be repeated without end up to llguidance 1.7, which vLLM pins.
SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "additionalProperties": False}
ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}

ArgumentSchemas = Mapping[str, Mapping[str, Any]]  # what llguidance compiles for the arguments of each tool, by name


@dataclass(frozen=True)
class JsonAnswer:
    """The answer is one JSON document that `schema` accepts. strict: OpenAI's rules for the schema itself apply."""

    schema: Mapping[str, Any]
    param: str
    name: str = "response"
    strict: bool = False


@dataclass(frozen=True)
class RegexAnswer:
    """The whole answer matches `pattern`."""

    pattern: str
    param: str


@dataclass(frozen=True)
class ChoiceAnswer:
    """The answer is one of `choices`."""

    choices: tuple[str, ...]
    param: str


AnswerConstraint = JsonAnswer | RegexAnswer | ChoiceAnswer


@dataclass(frozen=True)
class ToolUse:
    """`tool_choice` and `parallel_tool_calls` of one request."""

    is_required: bool = False
    name: str | None = None  # the one tool that must be called
    is_parallel: bool = True  # several calls may follow each other


USE_IF_WANTED = ToolUse()


def answer_grammar(constraint: AnswerConstraint, work: Work | None = None) -> str:
    """The grammar of an answer without tools. Raises PromptError for a constraint that is not supported."""
    match constraint:
        case JsonAnswer():
            return f'{HEADER}start: " "? value\n{_value(constraint, work)}'
        case RegexAnswer(pattern, param):
            reason = check_pattern(pattern)
            if reason:
                raise PromptError(f"Invalid '{param}': {reason}", param)
            return _text_grammar(_slashed(portable(_without_anchors(pattern))))
        case ChoiceAnswer(choices, param):
            if len(choices) > MAX_CHOICES:
                raise PromptError(f"Invalid '{param}': more than {MAX_CHOICES} choices.", param)
            return _text_grammar("|".join(_literal(choice) for choice in choices))


def arguments_schema(tool: Tool, work: Work | None = None) -> dict[str, Any]:
    """What llguidance compiles for a tool's arguments. Raises PromptError.

    No parameters mean no arguments, as in OpenAI's API.
    """
    if not tool.parameters:
        return NO_ARGUMENTS
    schema = tool.parameters if "type" in tool.parameters else {"type": "object", **tool.parameters}
    return supported_schema(schema, f"schema for function '{tool.name}'", "tools", tool.strict, work)


def call_grammars(syntax: ToolSyntax, schemas: ArgumentSchemas, use: ToolUse) -> tuple[dict[str, str], str | None]:
    """For calls that the model begins by itself: for each opening the grammar of the text behind it, up to the end of
    the call; and the grammar of the text between two calls, up to the end of the second one's opening."""
    by_opening: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, schema in schemas.items():
        by_opening.setdefault(syntax.opening.replace("{name}", name), {})[name] = schema
    bodies = {
        opening: f"{HEADER}start: {' | '.join(f'body{i}' for i in range(len(group)))}\n{_call_rules(syntax, group)}"
        for opening, group in by_opening.items()
    }
    if not _is_parallel(use):
        return bodies, None
    between = " | ".join(_quoted(syntax.separator + opening) for opening in by_opening)
    return bodies, f"{HEADER}start: {between}\n"


def forced_grammar(syntax: ToolSyntax, schemas: ArgumentSchemas, use: ToolUse) -> str:
    """The grammar of an answer that consists of calls. It may end after each of them."""
    return HEADER + 'start: " "? call' + _more_calls(use) + _call_rules(syntax, schemas)


def json_or_calls_grammar(constraint: JsonAnswer, syntax: ToolSyntax, schemas: ArgumentSchemas, use: ToolUse) -> str:
    """The grammar of an answer that is either one document or calls."""
    start = f'start: " "? (value | calls)\n{_value(constraint)}calls: call'
    return HEADER + start + _more_calls(use) + _call_rules(syntax, schemas)


def _value(constraint: JsonAnswer, work: Work | None = None) -> str:
    what = f"schema for {constraint.param} '{constraint.name}'"
    schema = supported_schema(constraint.schema, what, constraint.param, constraint.strict, work)
    return f"value: %json {_json(schema)}\n"


def _is_parallel(use: ToolUse) -> bool:
    return use.is_parallel and use.name is None


def _more_calls(use: ToolUse) -> str:
    return f" (separator call){{0,{MAX_CALLS - 1}}}\n" if _is_parallel(use) else "\n"


def _call_rules(syntax: ToolSyntax, schemas: ArgumentSchemas) -> str:
    lines = [f"separator: {_quoted(syntax.separator)}"]
    lines.append("call: " + " | ".join(f"call{i}" for i in range(len(schemas))))
    for i, (name, schema) in enumerate(schemas.items()):
        opening = _quoted(syntax.opening.replace("{name}", name))
        before = _quoted(syntax.before.replace("{name}", name))
        lines.append(f"call{i}: {opening} body{i}")
        lines.append(f"body{i}: {before} arguments{i} {_quoted(syntax.after)}")
        lines.append(f"arguments{i}: %json {_json(schema)}")
    return "\n".join(lines) + "\n"


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": SPACING})


def _text_grammar(pattern: str) -> str:
    """An optional space and a text that matches; the space is required if the text itself begins with one."""
    return f'{HEADER}start: TEXT\nTEXT: (/(?:{pattern})/ & ~/ (?s:.*)/) | " " /(?:{pattern})/\n'


def _quoted(text: str) -> str:
    return json.dumps(text)


def _slashed(pattern: str) -> str:
    """The pattern, escaped to stand between slashes."""
    escapes = {"/": r"\/", "\n": r"\n"}
    return re.sub(r"\\.|/|\n", lambda found: escapes.get(found[0], found[0]), pattern, flags=re.DOTALL)


def _without_anchors(pattern: str) -> str:
    """The pattern without `^` and `$` at its ends: the whole answer has to match."""
    inner = pattern.removeprefix("^")
    num_slashes = len(inner) - len(inner.removesuffix("$").rstrip("\\")) - 1
    return inner[:-1] if inner.endswith("$") and num_slashes % 2 == 0 else inner


def _literal(text: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else f"\\x{{{ord(c):X}}}" for c in text)
