"""JSON schemas, regular expressions, choices and tools -> the text of a grammar in llguidance's Lark dialect.

Every grammar allows one space in front of the answer: many tokenizers put one in front of the first word, and decoding
drops it. `ConstrainedText` removes it, and the rest matches the constraint.

Source: llguidance docs/syntax.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.generation.interface import PromptError, Tool, ToolSyntax
from serving.generation.structured.json_schema import check_pattern, check_schema, compilable, portable

MAX_CALLS = 16  # of one answer
MAX_CHOICES = 2000
HEADER = '%llguidance {"no_forcing": true}\n'  # every tokenization of a text may be sampled
# White space between the parts of a document: an optional space behind commas and colons. A general pattern for white
# space (`whitespace_pattern`) may be repeated without end up to llguidance 1.7, which vLLM pins.
SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


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


def answer_grammar(constraint: AnswerConstraint) -> str:
    """The grammar of an answer without tools. Raises PromptError for a constraint that is not supported."""
    match constraint:
        case JsonAnswer():
            return f'{HEADER}start: " "? value\n{_value(constraint)}'
        case RegexAnswer(pattern, param):
            reason = check_pattern(pattern)
            if reason:
                raise PromptError(f"Invalid '{param}': {reason}", param)
            return _text_grammar(_slashed(portable(_without_anchors(pattern))))
        case ChoiceAnswer(choices, param):
            if len(choices) > MAX_CHOICES:
                raise PromptError(f"Invalid '{param}': more than {MAX_CHOICES} choices.", param)
            return _text_grammar("|".join(_literal(choice) for choice in choices))


def call_grammars(syntax: ToolSyntax, tools: Sequence[Tool], use: ToolUse) -> dict[str, str]:
    """For each opening of a call the grammar of the text behind it, for calls that the model begins by itself."""
    by_opening: dict[str, list[int]] = {}
    for index, tool in enumerate(tools):
        by_opening.setdefault(syntax.opening.replace("{name}", tool.name), []).append(index)
    return {
        opening: HEADER
        + "start: ("
        + " | ".join(f"body{i}" for i in group)
        + ")"
        + _more_calls(use)
        + _call_rules(syntax, tools)
        for opening, group in by_opening.items()
    }


def forced_grammar(syntax: ToolSyntax, tools: Sequence[Tool], use: ToolUse) -> str:
    """The grammar of an answer that consists of calls."""
    wanted = [tool for tool in tools if use.name in (None, tool.name)]
    return HEADER + 'start: " "? call' + _more_calls(use) + _call_rules(syntax, wanted)


def json_or_calls_grammar(constraint: JsonAnswer, syntax: ToolSyntax, tools: Sequence[Tool], use: ToolUse) -> str:
    """The grammar of an answer that is either one document or calls."""
    start = f'start: " "? (value | calls)\n{_value(constraint)}calls: call'
    return HEADER + start + _more_calls(use) + _call_rules(syntax, tools)


def _value(constraint: JsonAnswer) -> str:
    what = f"schema for {constraint.param} '{constraint.name}'"
    check_schema(constraint.schema, what, constraint.param, constraint.strict)
    return f"value: %json {_json(constraint.schema)}\n"


def _more_calls(use: ToolUse) -> str:
    return f" (separator call){{0,{MAX_CALLS - 1}}}\n" if use.is_parallel and use.name is None else "\n"


def _call_rules(syntax: ToolSyntax, tools: Sequence[Tool]) -> str:
    lines = [f"separator: {_quoted(syntax.separator)}"]
    lines.append("call: " + " | ".join(f"call{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        opening = _quoted(syntax.opening.replace("{name}", tool.name))
        before = _quoted(syntax.before.replace("{name}", tool.name))
        lines.append(f"call{i}: {opening} body{i}")
        lines.append(f"body{i}: {before} arguments{i} {_quoted(syntax.after)}")
        lines.append(f"arguments{i}: %json {_json(arguments_schema(tool))}")
    return "\n".join(lines) + "\n"


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """A tool's parameters, limited to objects."""
    schema = dict(tool.parameters)
    return schema if "type" in schema else {"type": "object", **schema}


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps({**compilable(schema), "x-guidance": SPACING})


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
