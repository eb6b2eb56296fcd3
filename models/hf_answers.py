"""Reads the answers of Hugging Face models: text as it is, and tool calls in the Hermes syntax. Knows no tokens."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass

from serving.chat.types import AnswerPart, TextDelta, ToolCallDelta

OPENING, CLOSING = "<tool_call>", "</tool_call>"


class ExactAnswer:
    """The text as the model wrote it."""

    def push(self, text: str) -> list[AnswerPart]:
        return [TextDelta(text)] if text else []

    def flush(self) -> list[AnswerPart]:
        return []


@dataclass
class HermesAnswer:
    """Text with `<tool_call>{"name": …, "arguments": {…}}</tool_call>` in it, as Hermes and Qwen write calls.

    A call goes out whole, at its end. What is between the marks and no call of a known tool is text. White space in
    front of a call goes with it.
    """

    tool_names: frozenset[str]
    _held: str = ""
    _space: str = ""  # what stood in front of the call that is being read
    _num_calls: int = 0
    _is_inside: bool = False

    def push(self, text: str) -> list[AnswerPart]:
        self._held += text
        parts: list[AnswerPart] = []
        while True:
            before, mark, after = self._held.partition(CLOSING if self._is_inside else OPENING)
            if not mark:
                break
            if self._is_inside:
                parts += self._call(before, CLOSING)
            else:
                text = before.rstrip()
                parts += self._text(text)
                self._space = before[len(text) :]
            self._is_inside, self._held = not self._is_inside, after
        if not self._is_inside:
            limit = _settled_length(self._held)
            parts += self._text(self._held[:limit])
            self._held = self._held[limit:]
        return parts

    def flush(self) -> list[AnswerPart]:
        held, self._held = self._held, ""
        return self._call(held, "") if self._is_inside else self._text(held)

    def _text(self, text: str) -> list[AnswerPart]:
        if not text or (self._num_calls and not text.strip()):
            return []
        return [TextDelta(text)]

    def _call(self, text: str, closing: str) -> list[AnswerPart]:
        call = _parsed_call(text, self.tool_names)
        if call is None:
            return [TextDelta(f"{self._space}{OPENING}{text}{closing}")]
        self._num_calls += 1
        return [ToolCallDelta(self._num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", *call)]


def _parsed_call(text: str, tool_names: frozenset[str]) -> tuple[str, str] | None:
    """The name and the arguments as JSON text, or None."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or call.get("name") not in tool_names or not isinstance(call.get("arguments"), dict):
        return None
    return call["name"], json.dumps(call["arguments"], ensure_ascii=False)


def _settled_length(text: str) -> int:
    """How much of the text is no part of a call to come: all but a beginning of the mark and the space before it."""
    for size in range(min(len(OPENING) - 1, len(text)), 0, -1):
        if OPENING.startswith(text[-size:]):
            return len(text[:-size].rstrip())
    return len(text.rstrip())
