"""Reads tool calls out of an answer as they come. Knows how a call is written, no tokens. Nothing is evaluated."""

from __future__ import annotations

import re
import uuid
from typing import Literal

from serving.generation.interface import AnswerParser, AnswerPart, TextDelta, ToolCallDelta, ToolSyntax

_SPACE = " \t\n\r\v\f"  # what the mask, which sees bytes, takes for white space
_MARKS = re.compile(r'["\\{}\[\]]')


class JsonEnd:
    """Finds the end of one JSON object or array in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def push(self, text: str) -> int | None:
        """How many characters of `text` belong to the document; None if it goes on behind them."""
        place = 0
        while True:
            if self._is_escaped and place < len(text):
                self._is_escaped = False
                place += 1
            found = _MARKS.search(text, place)
            if found is None:
                return None
            place = found.end()
            mark = found.group()
            if self._in_string:
                self._is_escaped = mark == "\\"
                self._in_string = mark != '"'
            elif mark == '"':
                self._in_string = True
            elif mark != "\\":
                self._depth += 1 if mark in "{[" else -1
                if self._depth == 0:
                    return place


class ToolCallParser:
    """Text through the family's own reader until an opening is complete; from there on, calls and nothing else.

    Arguments go out as they come. A call that the answer's length cuts before its arguments begin is left out.
    is_forced: the answer is calls from its first character on.
    """

    def __init__(self, syntax: ToolSyntax, names: tuple[str, ...], text: AnswerParser, is_forced: bool) -> None:
        self._syntax = syntax
        self._heads = {
            syntax.opening.replace("{name}", name) + syntax.before.replace("{name}", name): name for name in names
        }
        self._openings = {syntax.opening.replace("{name}", name) for name in names}
        self._text = text
        self._state: Literal["text", "head", "arguments", "after"] = "head" if is_forced else "text"
        self._held = ""
        self._num_calls = 0
        self._end = JsonEnd()
        self._is_start = True  # nothing but white space has come

    def push(self, text: str) -> list[AnswerPart]:
        self._held += text
        parts: list[AnswerPart] = []
        while True:
            before = self._state
            parts += self._advance()
            if self._state == before:
                return parts

    def flush(self) -> list[AnswerPart]:
        held, self._held = self._held, ""
        if self._state != "text":
            return []
        return [*self._text.push(held), *self._text.flush()]

    def _advance(self) -> list[AnswerPart]:
        match self._state:
            case "text":
                return self._read_text()
            case "head":
                return self._read_head()
            case "arguments":
                return self._read_arguments()
            case "after":
                return self._read_after()

    def _read_text(self) -> list[AnswerPart]:
        if self._syntax.is_at_start:
            return self._read_first_line()
        places = {opening: self._held.find(opening) for opening in self._openings}
        found = [place for place in places.values() if place >= 0]
        if found:
            text, self._held = self._held[: min(found)], self._held[min(found) :]
            self._state = "head"
            # white space in front of a call goes with it
            return [*self._text.push(text.rstrip()), *self._text.flush()]
        keep = len(self._held) - len(self._held[: _settled(self._held, self._openings)].rstrip())
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._text.push(text) if text else []

    def _read_first_line(self) -> list[AnswerPart]:
        begun = self._held.lstrip(_SPACE)
        if self._is_start and any(begun.startswith(opening) for opening in self._openings):
            self._held = begun
            self._state = "head"
            return []
        if self._is_start and any(opening.startswith(begun) for opening in self._openings):
            return []
        self._is_start = False
        text, self._held = self._held, ""
        return self._text.push(text) if text else []

    def _read_head(self) -> list[AnswerPart]:
        self._held = self._held.lstrip()
        for head, name in self._heads.items():
            if self._held.startswith(head):
                self._held = self._held[len(head) :]
                self._state = "arguments"
                self._end = JsonEnd()
                self._num_calls += 1
                return [ToolCallDelta(self._num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", name, "")]
        return []

    def _read_arguments(self) -> list[AnswerPart]:
        size = self._end.push(self._held)
        if size is None:
            text, self._held = self._held, ""
        else:
            text, self._held = self._held[:size], self._held[size:]
            self._state = "after"
        return [ToolCallDelta(self._num_calls - 1, None, None, text)] if text else []

    def _read_after(self) -> list[AnswerPart]:
        if self._held.startswith(self._syntax.after):
            self._held = self._held[len(self._syntax.after) :]
            self._state = "head"
        return []


class ConstrainedText:
    """The text as it is, but for one space in front, which the grammar allows every answer."""

    def __init__(self) -> None:
        self._has_begun = False

    def push(self, text: str) -> list[AnswerPart]:
        if not self._has_begun and text:
            self._has_begun = True
            text = text.removeprefix(" ")
        return [TextDelta(text)] if text else []

    def flush(self) -> list[AnswerPart]:
        return []


def _settled(text: str, openings: set[str]) -> int:
    """How much of the text is no part of an opening to come."""
    longest = max(map(len, openings))
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(opening.startswith(text[-size:]) for opening in openings):
            return len(text) - size
    return len(text)
