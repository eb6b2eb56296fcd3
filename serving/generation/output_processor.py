"""Token outputs of one answer -> chat events: detokenizing, parsing, stop strings and counting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from serving.engine.interface import TokenMask
from serving.engine.outputs import TokenOutput
from serving.generation.detokenizer import Detokenizer
from serving.generation.interface import (
    AnswerParser,
    AnswerPart,
    ChatEvent,
    Finished,
    ReasoningDelta,
    RepeatedCall,
    TextDelta,
    TextToken,
    ToolCallDelta,
    Usage,
)
from serving.generation.reasoning import ReasoningSplitter
from serving.generation.stop_strings import StopStrings
from serving.generation.token_shares import TokenShares
from serving.generation.tools.custom import CustomInput


@dataclass(frozen=True)
class AnswerSpec:
    """How each answer of one prompt is sampled and read. Parsers and masks hold state: one of each for every answer."""

    parser: Callable[[], AnswerParser]
    decode: Callable[[Sequence[int]], str]
    mask: Callable[[], TokenMask] | None = None  # None: every token is allowed
    reasoning: Callable[[], ReasoningSplitter] | None = None  # for models that may think before they answer
    custom_tools: frozenset[str] = frozenset()


class PlainTextParser:
    """Returns the text unchanged; for raw completions."""

    def push(self, text: str) -> list[AnswerPart]:
        return [TextDelta(text)] if text else []

    def flush(self) -> list[AnswerPart]:
        return []


class OutputProcessor:
    """Processes the outputs of one choice. `is_over` also becomes true at a stop string and at a repeated tool call."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        token_bytes: Callable[[int], bytes],
        parser: AnswerParser,
        stop: tuple[str, ...],
        num_prompt_tokens: int,
        stop_token_ids: frozenset[int],
        before: Sequence[int] = (),
        has_logprobs: bool = False,
        reasoning: ReasoningSplitter | None = None,
        custom_tools: frozenset[str] = frozenset(),
    ) -> None:
        """stop_token_ids: they end the answer and have no text. before: the ids whose text the answer continues."""
        self._detokenizer = Detokenizer(decode, token_bytes, before)
        self._parser = parser
        self._stop = StopStrings(stop) if stop else None
        self._stop_token_ids = stop_token_ids
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._num_reported = 0  # of them, those that deltas have counted
        self._num_cached_tokens = 0
        self._called_tools = False
        self._repeats_call = False
        self._token_bytes = token_bytes
        self._shares = TokenShares(token_bytes) if has_logprobs else None
        self._reasoning = reasoning
        self._num_reasoning = 0  # tokens
        self._custom_tools = custom_tools
        self._inputs: dict[int, CustomInput] = {}  # of the calls of custom tools
        self.is_over = False

    def push(self, output: TokenOutput) -> list[ChatEvent]:
        """The events of this token; the last of them is Finished when the answer is over."""
        self._num_tokens += 1
        self._num_cached_tokens = output.num_cached_tokens
        ended_by_token = output.finish_reason == "stop" and output.token_id in self._stop_token_ids
        events: list[ChatEvent] = []
        if not ended_by_token:
            if output.logprob and self._shares is not None:
                self._shares.push_token(output.logprob)
            events += self._read(self._detokenizer.push(output.token_id))
        if output.finish_reason and not self._is_stopped:
            events += self._read(self._detokenizer.flush(), is_last=True)
            events += self._show(self._parser.flush())
        if output.finish_reason and not self._is_stopped:
            events += self._held_text()
        if output.finish_reason or self._is_stopped:
            events += self._finish("length" if output.finish_reason == "length" and not self._is_stopped else "stop")
        return events

    @property
    def _is_stopped(self) -> bool:
        """Whether a stop string was found, or a call that was made before."""
        return self._repeats_call or (self._stop is not None and self._stop.hit is not None)

    def _read(self, text: str, is_last: bool = False) -> list[ChatEvent]:
        """The events of more text; of the last as much as it is."""
        if self._reasoning is None:
            return self._show(self._parser.push(text))
        was_inside = self._reasoning.is_inside
        pieces = [self._reasoning.push(text), *([self._reasoning.flush()] if is_last else [])]
        if not is_last and (was_inside or self._reasoning.is_inside) and not any(answer for _, answer in pieces):
            self._num_reasoning += 1
        if self._reasoning.is_inside and self._shares is not None:
            self._shares = TokenShares(self._token_bytes)  # log-probabilities are those of the answer
        events: list[ChatEvent] = []
        for thought, answer in pieces:
            if thought:
                events.append(ReasoningDelta(thought, self._num_tokens - self._num_reported))
                self._num_reported = self._num_tokens
            if answer:
                events += self._show(self._parser.push(answer))
        return events

    def _show(self, parts: list[AnswerPart]) -> list[ChatEvent]:
        events: list[ChatEvent] = []
        for part in parts:
            match part:
                case TextDelta(text):
                    if shown := text if self._stop is None else self._stop.push(text):
                        events += self._text(shown)
                case ToolCallDelta():
                    self._called_tools = True
                    events += self._held_text()
                    if self._shares is not None:
                        events += self._delta(*self._shares.flush(with_all_tokens=False))
                        self._shares = None  # the tokens of calls have no share of the text
                    events.append(self._call(part))
                case RepeatedCall():
                    self._repeats_call = True
        return events

    def _call(self, part: ToolCallDelta) -> ToolCallDelta:
        """As the client sees it."""
        if part.name in self._custom_tools:
            self._inputs[part.index] = CustomInput()
        found = self._inputs.get(part.index)
        if found is None:
            return part
        return replace(part, arguments=found.push(part.arguments), is_custom=True)

    def _held_text(self) -> list[TextDelta]:
        """Text that could have been the beginning of a stop string, and is not."""
        text = "" if self._stop is None else self._stop.flush()
        return self._text(text) if text else []

    def _text(self, text: str) -> list[TextDelta]:
        if self._shares is None:
            return self._delta(text)
        self._shares.push_text(text)
        return self._delta(*self._shares.take())

    def _delta(self, text: str, tokens: tuple[TextToken, ...] = ()) -> list[TextDelta]:
        if not text and not tokens:
            return []
        delta = TextDelta(text, tokens, self._num_tokens - self._num_reported)
        self._num_reported = self._num_tokens
        return [delta]

    def _finish(self, reason: str) -> list[ChatEvent]:
        self.is_over = True
        usage = Usage(self._num_prompt_tokens, self._num_tokens, self._num_cached_tokens, self._num_reasoning)
        events: list[ChatEvent] = []
        if self._shares is not None:
            events += self._delta(*self._shares.flush())
        if reason == "length":
            return [*events, Finished("length", usage)]
        stop_string = None if self._stop is None else self._stop.hit
        return [*events, Finished("tool_calls" if self._called_tools else "stop", usage, stop_string)]
