"""Text of an answer, in pieces -> text deltas and tool-call deltas. Arguments stay JSON text; nothing is evaluated."""

from __future__ import annotations

import re
import uuid
from typing import Literal

from serving.generation.interface import AnswerParser, AnswerPart, RepeatedCall, TextDelta, ToolCallDelta, ToolSyntax

_SPACE = " \t\n\r\v\f"  # the white space of `bytes.lstrip`, which the mask uses
_MARKS = re.compile(r'["\\{}\[\]]')


class JsonEnd:
    """Finds the end of one JSON object or array in text that arrives in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def push(self, text: str) -> int | None:
        """The number of characters of `text` that belong to the document; None if the document continues after it."""
        position = 0
        while True:
            if self._is_escaped and position < len(text):
                self._is_escaped = False
                position += 1
            found = _MARKS.search(text, position)
            if found is None:
                return None
            position = found.end()
            mark = found.group()
            if self._in_string:
                self._is_escaped = mark == "\\"
                self._in_string = mark != '"'
            elif mark == '"':
                self._in_string = True
            elif mark != "\\":
                self._depth += 1 if mark in "{[" else -1
                if self._depth == 0:
                    return position


class ToolCallParser:
    """Passes text to the family's parser until the opening of a call is complete; reads only calls from there on.

    Arguments are returned as they arrive. A call that `max_tokens` cuts before its arguments begin is left out.
    A call with the name and the arguments of an earlier one is not returned and ends the answer: some models repeat a
    call until `max_tokens`. Deltas are held back while their call may still turn out to repeat another.
    is_forced: the answer consists of calls.
    """

    def __init__(self, syntax: ToolSyntax, names: tuple[str, ...], text: AnswerParser, is_forced: bool) -> None:
        self._syntax = syntax
        self._heads = {
            syntax.opening.replace("{name}", name) + syntax.before.replace("{name}", name): name for name in names
        }
        self._openings = {syntax.opening.replace("{name}", name) for name in names}
        self._text = text
        self._state: Literal["text", "head", "arguments", "after", "over"] = "head" if is_forced else "text"
        self._held = ""
        self._name, self._arguments = "", ""  # of the call that is being read
        self._num_calls = 0
        self._calls: list[tuple[str, str]] = []  # (name, arguments) of those that are complete
        self._is_held = False  # nothing of the call was returned yet
        self._end = JsonEnd()
        self._is_start = True  # only white space so far

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
            case "over":
                self._held = ""
                return []

    def _read_text(self) -> list[AnswerPart]:
        if self._syntax.is_at_start:
            return self._read_first_line()
        found = [position for opening in self._openings if (position := self._held.find(opening)) >= 0]
        if found:
            text, self._held = self._held[: min(found)], self._held[min(found) :]
            self._state = "head"
            # white space between text and call belongs to neither
            return [*self._text.push(text.rstrip()), *self._text.flush()]
        keep = len(self._held) - len(self._held[: _num_final(self._held, self._openings)].rstrip())
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._text.push(text) if text else []

    def _read_first_line(self) -> list[AnswerPart]:
        stripped = self._held.lstrip(_SPACE)
        if self._is_start and any(stripped.startswith(opening) for opening in self._openings):
            self._held = stripped
            self._state = "head"
            return []
        if self._is_start and any(opening.startswith(stripped) for opening in self._openings):
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
                self._name, self._arguments, self._is_held = name, "", True
                return self._release()
        return []

    def _read_arguments(self) -> list[AnswerPart]:
        size = self._end.push(self._held)
        text, self._held = self._held[:size], "" if size is None else self._held[size:]
        self._arguments += text
        if size is not None:
            self._state = "after"
            if (self._name, self._arguments) in self._calls:
                self._state = "over"
                return [RepeatedCall()]
            self._calls.append((self._name, self._arguments))
        if self._is_held:
            return self._release()
        return [ToolCallDelta(self._num_calls - 1, None, None, text)] if text else []

    def _release(self) -> list[AnswerPart]:
        """The call so far, unless it may still repeat an earlier one."""
        is_complete = self._state == "after"
        if not is_complete and any(n == self._name and a.startswith(self._arguments) for n, a in self._calls):
            return []
        self._is_held = False
        self._num_calls += 1
        begun = ToolCallDelta(self._num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", self._name, "")
        return [begun, ToolCallDelta(begun.index, None, None, self._arguments)] if self._arguments else [begun]

    def _read_after(self) -> list[AnswerPart]:
        if self._held.startswith(self._syntax.after):
            self._held = self._held[len(self._syntax.after) :]
            self._state = "head"
        return []


class ConstrainedText:
    """The text of a constrained answer without the one space in front that every grammar allows."""

    def __init__(self) -> None:
        self._has_stripped = False

    def push(self, text: str) -> list[AnswerPart]:
        if not self._has_stripped and text:
            self._has_stripped = True
            text = text.removeprefix(" ")
        return [TextDelta(text)] if text else []

    def flush(self) -> list[AnswerPart]:
        return []


def _num_final(text: str, openings: set[str]) -> int:
    """The number of characters that cannot belong to an opening whose rest has not arrived."""
    longest = max(map(len, openings))
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(opening.startswith(text[-size:]) for opening in openings):
            return len(text) - size
    return len(text)
