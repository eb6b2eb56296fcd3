"""What ChatGLM-6B (v1) does to its answers before a person sees them. Knows no tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from serving.generation.interface import AnswerParser, AnswerPart, TextDelta

FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}

# transformers' clean-up of 2023, which the original's decode ran on every answer, in its order.
_CLEAN_UPS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
_CLEAN_UP_CHARACTERS = frozenset("".join(pattern for pattern, _ in _CLEAN_UPS))


def clean_up_spaces(text: str) -> str:
    """Drop the spaces that English word pieces leave in front of punctuation and contractions."""
    for pattern, replacement in _CLEAN_UPS:
        text = text.replace(pattern, replacement)
    return text


def clean_up_limit(text: str) -> int:
    """How much of an unfinished text `clean_up_spaces` can be applied to, whatever comes after it.

    No pattern reaches over a character that is in none of them, nor over the gap in front of a space, unless that gap
    follows another space, an apostrophe or an n ("n ' t" becomes "n't").
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
    """How much of an unfinished text can be widened: a last punctuation mark waits for its neighbour."""
    return len(text) - 1 if text and text[-1] in FULL_WIDTH else len(text)


def _is_chinese(characters: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in characters)


@dataclass
class ChatGLMAnswerParser:
    """Reads one answer: `inner` strips it and fills in the placeholder, between the two steps that v1 adds to that.

    last: the character in front of the answer, if it goes on from something.
    """

    inner: AnswerParser
    last: str = ""  # the character in front of `_settled`, as the model wrote it
    _raw: str = ""
    _settled: str = ""

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
        self._settled += "".join(part.text for part in parts if isinstance(part, TextDelta))
        limit = limit_of(self._settled)
        if not limit:
            return []
        widened = widen(self.last + self._settled)[len(self.last) :][:limit]
        self.last, self._settled = self._settled[limit - 1], self._settled[limit:]
        return [TextDelta(widened)]
