"""The ids and the text of an answer, in pieces -> the parts that the client gets, for every family but ChatGLM-6B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from serving.generation.interface import AnswerParser, AnswerPart, TextDelta

PLACEHOLDER = "[[训练时间]]"  # ChatGLM models were trained to write this for the date of their training
REPLACEMENT = "2023年"


class AnswerTokenizer(Protocol):
    """What reading answers needs of a tokenizer; see `ChatFormat`."""

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...


TokenizerT = TypeVar("TokenizerT", bound=AnswerTokenizer)


class TrimmedAnswers(Generic[TokenizerT]):
    """The methods of a `ChatFormat` that read answers, without outer white space."""

    has_reasoning: bool = False

    def __init__(self, tokenizer: TokenizerT) -> None:
        self._tokenizer = tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def parser(self, begun: str = "") -> AnswerParser:
        return TrimmedAnswerParser(bool(begun))

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)


class TrimmedAnswerParser:
    """Strips an answer's outer white space and fills in the training date.

    The result is `text.strip().replace(PLACEHOLDER, REPLACEMENT)`, however the text was split. has_begun: the text
    continues an answer, so its leading white space is part of it.
    Source: process_response in modeling_chatglm.py of ChatGLM2 and ChatGLM3.
    """

    def __init__(self, has_begun: bool = False) -> None:
        self._pending = ""
        self._has_begun = has_begun

    def push(self, text: str) -> list[AnswerPart]:
        self._pending += text
        if not self._has_begun:
            self._pending = self._pending.lstrip()
            self._has_begun = bool(self._pending)
        text = self._pending.replace(PLACEHOLDER, REPLACEMENT)
        keep = _num_unsettled(text)
        self._pending = text[len(text) - keep :]
        return _parts(text[: len(text) - keep])

    def flush(self) -> list[AnswerPart]:
        text, self._pending = self._pending.rstrip(), ""
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
