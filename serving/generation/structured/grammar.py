"""What an answer has to look like, and that as the text of a grammar. Knows no tokens and no library but its syntax.

Grammars are written for the first space of an answer, too: many tokenizers put one in front of the first word, which
decoding drops again. An answer may begin with one, `serving.generation.pipeline` takes it away, and what is left fits.
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
HEADER = '%llguidance {"no_forcing": true}\n'  # every spelling of a text in tokens may be sampled
# Between the parts of a document: a space behind commas and colons, or none, and no other. A pattern for white space in
# general (`whitespace_pattern`) may be repeated for ever up to llguidance 1.7, which vLLM pins.
SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


@dataclass(frozen=True)
class JsonAnswer:
    """The answer is one JSON document. strict: OpenAI's rules for the schema itself apply."""

    schema: Mapping[str, Any]
    param: str
    name: str = "response"
    strict: bool = False


@dataclass(frozen=True)
class RegexAnswer:
    """The whole answer matches."""

    pattern: str
    param: str


@dataclass(frozen=True)
class ChoiceAnswer:
    """The answer is one of these."""

    choices: tuple[str, ...]
    param: str


AnswerConstraint = JsonAnswer | RegexAnswer | ChoiceAnswer


@dataclass(frozen=True)
class ToolUse:
    """How a request wants its tools to be called."""

    is_required: bool = False
    name: str | None = None  # this one has to be called
    is_parallel: bool = True


USE_IF_WANTED = ToolUse()


def answer_grammar(constraint: AnswerConstraint) -> str:
    """Raises PromptError for what must not be compiled."""
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
    """What may follow an opening, by opening. Used when the model itself began a call."""
    by_opening: dict[str, list[int]] = {}
    for index, tool in enumerate(tools):
        by_opening.setdefault(syntax.opening.replace("{name}", tool.name), []).append(index)
    return {
        opening: HEADER + "start: (" + " | ".join(f"call{i}" for i in group) + ")" + _more(use) + _rules(syntax, tools)
        for opening, group in by_opening.items()
    }


def forced_grammar(syntax: ToolSyntax, tools: Sequence[Tool], use: ToolUse) -> str:
    """Nothing but calls from the first token on."""
    wanted = [tool for tool in tools if use.name in (None, tool.name)]
    return HEADER + 'start: " "? whole' + _more(use) + _rules(syntax, wanted)


def json_or_calls_grammar(constraint: JsonAnswer, syntax: ToolSyntax, tools: Sequence[Tool], use: ToolUse) -> str:
    """A document, or calls and nothing else."""
    start = f'start: " "? (value | calls)\n{_value(constraint)}calls: whole'
    return HEADER + start + _more(use) + _rules(syntax, tools)


def _value(constraint: JsonAnswer) -> str:
    what = f"schema for response_format '{constraint.name}'"
    check_schema(constraint.schema, what, constraint.param, constraint.strict)
    return f"value: %json {_json(constraint.schema)}\n"


def _more(use: ToolUse) -> str:
    return f" (separator whole){{0,{MAX_CALLS - 1}}}\n" if use.is_parallel and use.name is None else "\n"


def _rules(syntax: ToolSyntax, tools: Sequence[Tool]) -> str:
    lines = [f"separator: {_quoted(syntax.separator)}"]
    lines.append("whole: " + " | ".join(f"whole{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        opening = _quoted(syntax.opening.replace("{name}", tool.name))
        before = _quoted(syntax.before.replace("{name}", tool.name))
        lines.append(f"whole{i}: {opening} call{i}")
        lines.append(f"call{i}: {before} arguments{i} {_quoted(syntax.after)}")
        lines.append(f"arguments{i}: %json {_json(arguments_schema(tool))}")
    return "\n".join(lines) + "\n"


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """A tool's parameters; arguments are an object whatever the schema leaves open."""
    schema = dict(tool.parameters)
    return schema if "type" in schema else {"type": "object", **schema}


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps({**compilable(schema), "x-guidance": SPACING})


def _text_grammar(pattern: str) -> str:
    """A text, or a space and a text; a text that begins with a space needs that other one in front."""
    return f'{HEADER}start: TEXT\nTEXT: (/(?:{pattern})/ & ~/ (?s:.*)/) | " " /(?:{pattern})/\n'


def _quoted(text: str) -> str:
    return json.dumps(text)


def _slashed(pattern: str) -> str:
    """The pattern as it may stand between slashes."""
    escapes = {"/": r"\/", "\n": r"\n"}
    return re.sub(r"\\.|/|\n", lambda found: escapes.get(found[0], found[0]), pattern, flags=re.DOTALL)


def _without_anchors(pattern: str) -> str:
    """The whole answer has to match anyway."""
    inner = pattern.removeprefix("^")
    num_slashes = len(inner) - len(inner.removesuffix("$").rstrip("\\")) - 1
    return inner[:-1] if inner.endswith("$") and num_slashes % 2 == 0 else inner


def _literal(text: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else f"\\x{{{ord(c):X}}}" for c in text)
