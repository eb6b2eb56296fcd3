"""Token outputs of one answer -> chat events: detokenizing, parsing, stop strings and counting."""

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
    """Returns the text unchanged; for raw completions."""

    def push(self, text: str) -> list[AnswerPart]:
        return [TextDelta(text)] if text else []

    def flush(self) -> list[AnswerPart]:
        return []


class OutputProcessor:
    """Processes the outputs of one choice. `is_over` also becomes true when a stop string was found."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        parser: AnswerParser,
        stop: tuple[str, ...],
        num_prompt_tokens: int,
        stop_token_ids: frozenset[int],
        before: Sequence[int] = (),
    ) -> None:
        """stop_token_ids: they end the answer and have no text. before: the ids whose text the answer continues."""
        self._detokenizer = Detokenizer(decode, before)
        self._parser = parser
        self._stop = StopStrings(stop) if stop else None
        self._stop_token_ids = stop_token_ids
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._num_reported = 0  # of them, those that deltas have counted
        self._num_cached_tokens = 0
        self._called_tools = False
        self._logprobs: list[TokenLogprob] = []
        self.is_over = False

    def push(self, output: TokenOutput) -> list[ChatEvent]:
        """The events of this token; the last of them is Finished when the answer is over."""
        self._num_tokens += 1
        self._num_cached_tokens = output.num_cached_tokens
        ended_by_token = output.finish_reason == "stop" and output.token_id in self._stop_token_ids
        events: list[ChatEvent] = []
        if not ended_by_token:
            if output.logprob:
                self._logprobs.append(output.logprob)
            events += self._show(self._parser.push(self._detokenizer.push(output.token_id)))
        if output.finish_reason and not self._is_stopped:
            events += self._show(self._parser.push(self._detokenizer.flush()))
            events += self._show(self._parser.flush())
        if output.finish_reason and not self._is_stopped:
            events += self._held_text()
        if output.finish_reason or self._is_stopped:
            events += self._finish("length" if output.finish_reason == "length" and not self._is_stopped else "stop")
        return events

    @property
    def _is_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop is not None and self._stop.hit

    def _show(self, parts: list[AnswerPart]) -> list[ChatEvent]:
        events: list[ChatEvent] = []
        for part in parts:
            match part:
                case TextDelta(text):
                    if shown := text if self._stop is None else self._stop.push(text):
                        events.append(self._text(shown))
                case ToolCallDelta():
                    self._called_tools = True
                    events += (*self._held_text(), part)
        return events

    def _held_text(self) -> list[TextDelta]:
        """Text that could have been the beginning of a stop string, and is not."""
        text = "" if self._stop is None else self._stop.flush()
        return [self._text(text)] if text else []

    def _text(self, text: str) -> TextDelta:
        delta = TextDelta(text, tuple(self._logprobs), self._num_tokens - self._num_reported)
        self._num_reported = self._num_tokens
        self._logprobs.clear()
        return delta

    def _finish(self, reason: str) -> list[ChatEvent]:
        self.is_over = True
        usage = Usage(self._num_prompt_tokens, self._num_tokens, self._num_cached_tokens)
        events: list[ChatEvent] = [self._text("")] if self._logprobs else []
        if reason == "length":
            return [*events, Finished("length", usage)]
        return [*events, Finished("tool_calls" if self._called_tools else "stop", usage)]
