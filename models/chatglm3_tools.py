"""Reads ChatGLM3's tool calls out of an answer. Knows its call syntax, no tokens. Nothing the model wrote is run."""

from __future__ import annotations

import ast
import json
import re
import uuid

from models.answers import TrimmedAnswer
from serving.chat.types import AnswerPart, ToolCallDelta

CALL = re.compile(r"\s*(?P<name>[^\s`]+)[ \t]*\n\s*```python[ \t]*\n(?P<code>.*?)\n?```\s*", re.DOTALL)


class ToolAnswer:
    """Reads an answer that is text, or a tool's name on the first line with a fenced `tool_call(...)` below it.

    Text goes out as soon as the first line cannot be the name of a tool; a call goes out whole, at its end.
    """

    def __init__(self, tool_names: tuple[str, ...]) -> None:
        self._tool_names = tool_names
        self._held: str | None = ""  # None: the answer turned out to be text
        self._text = TrimmedAnswer()

    def push(self, text: str) -> list[AnswerPart]:
        if self._held is None:
            return self._text.push(text)
        self._held += text
        if self._can_be_call(self._held):
            return []
        held, self._held = self._held, None
        return self._text.push(held)

    def flush(self) -> list[AnswerPart]:
        if self._held is None:
            return self._text.flush()
        calls = _parse_calls(self._held, self._tool_names)
        if calls is not None:
            return calls
        held, self._held = self._held, None
        return [*self._text.push(held), *self._text.flush()]

    def _can_be_call(self, answer: str) -> bool:
        first_line, newline, below = answer.partition("\n")
        name = first_line.strip()
        if not newline:
            return any(tool.startswith(name) for tool in self._tool_names)
        fence, below = "```python", below.lstrip()
        return name in self._tool_names and (below.startswith(fence) or fence.startswith(below))


def _parse_calls(answer: str, tool_names: tuple[str, ...]) -> list[AnswerPart] | None:
    """The calls of an answer that is nothing but calls; None for any other answer."""
    calls: list[AnswerPart] = []
    position = 0
    while position < len(answer):
        match = CALL.match(answer, position)
        arguments = parse_arguments(match["code"]) if match else None
        if match is None or arguments is None or match["name"] not in tool_names:
            return None
        calls.append(ToolCallDelta(len(calls), f"call_{uuid.uuid4().hex[:24]}", match["name"], arguments))
        position = match.end()
    return calls or None


def parse_arguments(code: str) -> str | None:
    """`tool_call(city='x', days=2)` -> its arguments as JSON text; None unless it is exactly one call of literals."""
    try:
        call = ast.parse(code.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "tool_call":
            return None
        if call.args:
            return None
        arguments: dict[str, object] = {}
        for argument in call.keywords:
            value = ast.literal_eval(argument.value)
            arguments |= dict(value) if argument.arg is None else {argument.arg: value}
        return json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        # whatever a model may write; what is not a call of literals stays text
        return None
