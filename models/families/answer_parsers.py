"""What the ChatGLM families do to an answer before anybody sees it. Knows text and its end, no tokens."""

from __future__ import annotations

from serving.generation.interface import AnswerPart, TextDelta

PLACEHOLDER = "[[训练时间]]"  # the models were trained to write this for the date of their training
REPLACEMENT = "2023年"


class TrimmedAnswerParser:
    """Reads an answer and gives it without outer white space, the training date filled in.

    The whole is `text.strip().replace(PLACEHOLDER, REPLACEMENT)`, however the text was cut into pieces. has_begun: the
    text goes on from something, and its leading white space belongs in between.
    Source: process_response in modeling_chatglm.py of ChatGLM2 and ChatGLM3.
    """

    def __init__(self, has_begun: bool = False) -> None:
        self._held = ""
        self._has_begun = has_begun

    def push(self, text: str) -> list[AnswerPart]:
        self._held += text
        if not self._has_begun:
            self._held = self._held.lstrip()
            self._has_begun = bool(self._held)
        text = self._held.replace(PLACEHOLDER, REPLACEMENT)
        keep = _num_unsettled(text)
        self._held = text[len(text) - keep :]
        return _parts(text[: len(text) - keep])

    def flush(self) -> list[AnswerPart]:
        text, self._held = self._held.rstrip(), ""
        return _parts(text)


class ExactAnswerParser:
    """The text as the model wrote it."""

    def push(self, text: str) -> list[AnswerPart]:
        return [TextDelta(text)] if text else []

    def flush(self) -> list[AnswerPart]:
        return []


def _num_unsettled(text: str) -> int:
    """How many characters at the end may still change: white space, or the beginning of the placeholder."""
    trailing = len(text) - len(text.rstrip())
    if trailing:
        return trailing
    for length in range(min(len(PLACEHOLDER) - 1, len(text)), 0, -1):
        if PLACEHOLDER.startswith(text[-length:]):
            return length
    return 0


def _parts(text: str) -> list[AnswerPart]:
    return [TextDelta(text)] if text else []
