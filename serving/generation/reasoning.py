"""Text of an answer in pieces -> what the model thought between <think> marks, and its answer behind them."""

from __future__ import annotations

from typing import Literal

OPENING, CLOSING = "<think>", "</think>"


class ReasoningSplitter:
    """Without the marks and the white space around them, however the text is cut. An answer may do without reasoning.

    Source: the chat templates of Qwen3, GLM-4.5 and DeepSeek-R1.
    """

    def __init__(self, has_begun: bool) -> None:
        """has_begun: the opening mark is the end of the prompt."""
        self._state: Literal["before", "reasoning", "behind", "answer"] = "reasoning" if has_begun else "before"
        self._held = ""
        self._has_text = False  # of the reasoning

    @property
    def is_inside(self) -> bool:
        """Whether no text of the answer has come since the opening mark."""
        return self._state in ("reasoning", "behind")

    def push(self, text: str) -> tuple[str, str]:
        """(more of the reasoning, more of the answer)"""
        if self._state == "answer":
            return "", text
        self._held += text
        if self._state == "before":
            self._look_for_opening()
        thought = self._take_reasoning() if self._state == "reasoning" else ""
        return thought, self._take_answer()

    def flush(self) -> tuple[str, str]:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        match self._state:
            case "before":
                return "", held
            case "reasoning":
                return held.rstrip() if self._has_text else held.strip(), ""
            case _:
                return "", ""

    def _look_for_opening(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(OPENING):
            self._held, self._state = begun.removeprefix(OPENING), "reasoning"
        elif not OPENING.startswith(begun):
            self._state = "answer"

    def _take_reasoning(self) -> str:
        if not self._has_text:
            self._held = self._held.lstrip()
        text, mark, rest = self._held.partition(CLOSING)
        if mark:
            self._held, self._state = rest, "behind"
            return text.rstrip()
        keep = max((n for n in range(1, len(CLOSING)) if text.endswith(CLOSING[:n])), default=0)
        settled = text[: len(text) - keep].rstrip()
        self._held = text[len(settled) :]
        self._has_text = self._has_text or bool(settled)
        return settled

    def _take_answer(self) -> str:
        if self._state == "behind":
            self._held = self._held.lstrip()
            self._state = "answer" if self._held else "behind"
        if self._state != "answer":
            return ""
        text, self._held = self._held, ""
        return text


def split_reasoning(text: str) -> tuple[str, str]:
    """(the reasoning, the answer) of a whole text; without marks all of it is the answer."""
    begun = text.lstrip()
    if not begun.startswith(OPENING) or CLOSING not in begun:
        return "", text
    thought, _, answer = begun.removeprefix(OPENING).partition(CLOSING)
    return thought.strip(), answer.lstrip()
