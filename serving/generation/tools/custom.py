"""Custom tools, which take text, as functions of one string; the JSON text of their arguments -> that text."""

from __future__ import annotations

import json
import re
from typing import Any

from serving.generation.interface import Tool

FIELD = "input"
_BEGINNING = re.compile(rf'\s*\{{\s*"{FIELD}"\s*:\s*"')
_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|[^u])")
_SURROGATE = re.compile(r"\\u[dD][89abAB]")


def custom_tool(name: str, description: str, pattern: str | None = None) -> Tool:
    """pattern: a regular expression that the whole input has to match. Its calls always have the one argument."""
    text: dict[str, Any] = {"type": "string"} if pattern is None else {"type": "string", "pattern": f"^(?:{pattern})$"}
    parameters = {"type": "object", "properties": {FIELD: text}, "required": [FIELD], "additionalProperties": False}
    return Tool(name, description, parameters, strict=True, is_custom=True)


def to_arguments(text: str) -> str:
    """The arguments of an earlier call."""
    return json.dumps({FIELD: text}, ensure_ascii=False)


class CustomInput:
    """Reads the one string of a call's arguments."""

    def __init__(self) -> None:
        self._held = ""
        self._has_begun = False
        self._is_over = False

    def push(self, text: str) -> str:
        """What more of the input is complete."""
        self._held += text
        if not self._has_begun:
            begun = _BEGINNING.match(self._held)
            if begun is None:
                return ""
            self._has_begun, self._held = True, self._held[begun.end() :]
        return "" if self._is_over else self._take()

    def _take(self) -> str:
        position = 0
        while position < len(self._held):
            if self._held[position] == '"':
                self._is_over = True
                break
            if self._held[position] != "\\":
                position += 1
                continue
            escape = _ESCAPE.match(self._held, position)
            if escape is None or (_SURROGATE.match(self._held, position) and len(self._held) < position + 12):
                break  # the rest of the character has not come
            position += 12 if _SURROGATE.match(self._held, position) else len(escape.group())
        complete, self._held = self._held[:position], self._held[position:]
        text = str(json.loads(f'"{complete}"', strict=False))
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a pair is no character
