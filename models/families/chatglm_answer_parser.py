"""The text of an answer of ChatGLM-6B, in pieces -> the parts that the client gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from serving.generation.interface import AnswerParser, AnswerPart, TextDelta

FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}

# transformers' clean-up of 2023, which the original's decode ran on every answer, in its order.
_CLEAN_UPS = (
    *((f" {mark}", mark) for mark in (".", "?", "!", ",")),
    (" ' ", "'"),
    *((f" {contraction}", contraction) for contraction in ("n't", "'m", "'s", "'ve", "'re")),
)
_CLEAN_UP_CHARACTERS = frozenset("".join(pattern for pattern, _ in _CLEAN_UPS))


def clean_up_spaces(text: str) -> str:
    """Remove the spaces that English word pieces leave in front of punctuation and contractions."""
    for pattern, replacement in _CLEAN_UPS:
        text = text.replace(pattern, replacement)
    return text


def clean_up_limit(text: str) -> int:
    """How many characters of an unfinished text `clean_up_spaces` can be applied to, whatever follows.

    No pattern contains a character that is in none of them, nor crosses the boundary in front of a space, unless that
    boundary follows another space, an apostrophe or an n ("n ' t" becomes "n't").
    """
    for index in range(len(text) - 1, -1, -1):
        if text[index] not in _CLEAN_UP_CHARACTERS:
            return index + 1
        if text[index] == " " and index > 0 and text[index - 1] not in " 'n":
            return index
    return 0


def widen(text: str) -> str:
    """Full-width punctuation next to a Chinese character. Source: chatglm-6b process_response."""
    around = f" {text} "
    return "".join(
        FULL_WIDTH[character] if character in FULL_WIDTH and _is_chinese(left + right) else character
        for left, character, right in zip(around, text, around[2:], strict=False)
    )


def widen_limit(text: str) -> int:
    """How many characters of an unfinished text `widen` can be applied to: a last mark depends on its neighbour."""
    return len(text) - 1 if text and text[-1] in FULL_WIDTH else len(text)


def _is_chinese(characters: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in characters)


@dataclass
class ChatGLMAnswerParser:
    """Cleans up spaces, strips and fills in the training date (`inner`), then makes punctuation full-width.

    last: the character in front of the answer, if it continues one.
    """

    inner: AnswerParser
    last: str = ""  # the character in front of `_stripped`, as the model wrote it
    _raw: str = ""
    _stripped: str = ""

    def push(self, text: str) -> list[AnswerPart]:
        self._raw += text
        limit = clean_up_limit(self._raw)
        ready, self._raw = clean_up_spaces(self._raw[:limit]), self._raw[limit:]
        return self._widened(self.inner.push(ready), widen_limit)

    def flush(self) -> list[AnswerPart]:
        parts = self.inner.push(clean_up_spaces(self._raw)) + self.inner.flush()
        self._raw = ""
        return self._widened(parts, len)

    def _widened(self, parts: list[AnswerPart], limit_of: Callable[[str], int]) -> list[AnswerPart]:
        self._stripped += "".join(part.text for part in parts if isinstance(part, TextDelta))
        limit = limit_of(self._stripped)
        if not limit:
            return []
        widened = widen(self.last + self._stripped)[len(self.last) :][:limit]
        self.last, self._stripped = self._stripped[limit - 1], self._stripped[limit:]
        return [TextDelta(widened)]
