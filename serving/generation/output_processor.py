"""One answer being read: tokens in, events out. The one loop that streaming and not streaming share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.engine.interface import TokenLogprob, TokenMask, TokenOutput
from serving.generation.detokenizer import Detokenizer
from serving.generation.interface import (
    AnswerParser,
    AnswerPart,
    ChatEvent,
    Finished,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from serving.generation.stop_strings import StopStrings


@dataclass(frozen=True)
class AnswerSpec:
    """How each answer of one prompt is sampled and read. Parsers and masks hold state: one of each for every answer."""

    parser: Callable[[], AnswerParser]
    decode: Callable[[Sequence[int]], str]
    mask: Callable[[], TokenMask] | None = None  # None: every token is allowed


class PlainTextParser:
    """Leaves a text as it is; for raw completions."""

    def push(self, text: str) -> list[AnswerPart]:
        return [TextDelta(text)] if text else []

    def flush(self) -> list[AnswerPart]:
        return []


class OutputProcessor:
    """Reads the steps of one choice. `is_over` becomes true when a stop string was found, too."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        reader: AnswerParser,
        stop: tuple[str, ...],
        num_prompt_tokens: int,
        ends: frozenset[int],
        before: Sequence[int] = (),
    ) -> None:
        """ends: the token ids that end the answer and have no text; before: the ids that its text goes on from."""
        self._detokenizer = Detokenizer(decode, before)
        self._reader = reader
        self._stop = StopStrings(stop)
        self._ends = ends
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._num_told = 0  # of them, those that deltas have counted
        self._num_cached_tokens = 0
        self._called_tools = False
        self._logprobs: list[TokenLogprob] = []
        self.is_over = False

    def push(self, step: TokenOutput) -> list[ChatEvent]:
        """The events that this step brings; the last of them is Finished when the answer is over."""
        self._num_tokens += 1
        self._num_cached_tokens = step.num_cached_tokens
        ended_by_token = step.finish_reason == "stop" and step.token_id in self._ends
        events: list[ChatEvent] = []
        if not ended_by_token:
            if step.logprob:
                self._logprobs.append(step.logprob)
            events += self._show(self._reader.push(self._detokenizer.push(step.token_id)))
        if step.finish_reason and not self._stop.hit:
            events += self._show(self._reader.push(self._detokenizer.flush()))
            events += self._show(self._reader.flush())
        if step.finish_reason and not self._stop.hit and (rest := self._stop.flush()):
            events.append(self._text(rest))
        if step.finish_reason or self._stop.hit:
            events += self._finish("length" if step.finish_reason == "length" and not self._stop.hit else "stop")
        return events

    def _show(self, parts: list[AnswerPart]) -> list[ChatEvent]:
        events: list[ChatEvent] = []
        for part in parts:
            match part:
                case TextDelta(text):
                    shown = self._stop.push(text)
                    if shown:
                        events.append(self._text(shown))
                case ToolCallDelta():
                    self._called_tools = True
                    if before := self._stop.flush():
                        events.append(self._text(before))
                    events.append(part)
        return events

    def _text(self, text: str) -> TextDelta:
        delta = TextDelta(text, tuple(self._logprobs), self._num_tokens - self._num_told)
        self._num_told = self._num_tokens
        self._logprobs.clear()
        return delta

    def _finish(self, reason: str) -> list[ChatEvent]:
        self.is_over = True
        usage = Usage(self._num_prompt_tokens, self._num_tokens, self._num_cached_tokens)
        events: list[ChatEvent] = [self._text("")] if self._logprobs else []
        if reason == "length":
            return [*events, Finished("length", usage)]
        return [*events, Finished("tool_calls" if self._called_tools else "stop", usage)]
