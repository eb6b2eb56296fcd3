"""Events of a chat answer -> the whole completion, or the server-sent events of a stream; and their published types."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from serving.generation.interface import (
    AnswerDelta,
    ChatEvent,
    Finished,
    IndexedEvent,
    ReasoningDelta,
    TextDelta,
    TextToken,
    ToolCallDelta,
    Usage,
)
from serving.http import server_sent_events as sse
from serving.http.errors import APIError
from serving.http.errors import envelope as error_json
from serving.http.server_sent_events import to_json
from serving.openai.common import ChunkOptions, Count, Envelope, TokenBytes, by_choice
from serving.openai.logprobs import TokenLogprobEntry, to_entries
from serving.openai.usage import CompletionUsage, RunningUsage, to_completion_usage, total_usage

FinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class ChoiceLogprobs(TypedDict):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprobEntry]
    refusal: None


class CalledFunction(TypedDict):
    """`arguments` is JSON text."""

    name: str
    arguments: str


class CalledCustomTool(TypedDict):
    """`input` is text."""

    name: str
    input: str


class AnswerCustomCall(TypedDict):
    """A call of a custom tool that the model wants made."""

    id: str
    type: Literal["custom"]
    custom: CalledCustomTool


class AnswerToolCall(TypedDict):
    """A call that the model wants made."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(TypedDict):
    """The answer of one choice."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: Annotated[list[Any], Field(max_length=0)]
    reasoning_content: NotRequired[str]  # what the model thought before
    reasoning: NotRequired[str]  # the same: both names are in use
    tool_calls: NotRequired[Annotated[list[AnswerToolCall | AnswerCustomCall], Field(min_length=1)]]
    function_call: NotRequired[CalledFunction]


class ChatChoice(TypedDict):
    """One of n answers."""

    index: Count
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """The whole answer to a chat request."""

    id: str
    object: Literal["chat.completion"]
    created: Count
    model: str
    choices: Annotated[list[ChatChoice], Field(min_length=1)]
    usage: CompletionUsage
    service_tier: Literal["default"]
    system_fingerprint: str


class FunctionDelta(TypedDict):
    """The name once, then pieces of the arguments."""

    name: NotRequired[str]
    arguments: str


class CustomDelta(TypedDict):
    """The name once, then pieces of the input."""

    name: NotRequired[str]
    input: str


class CustomCallDeltaEntry(TypedDict):
    """More of one call of a custom tool; id, type and name come once."""

    index: Count
    id: NotRequired[str]
    type: NotRequired[Literal["custom"]]
    custom: CustomDelta


class ToolCallDeltaEntry(TypedDict):
    """More of one call; id, type and name come once."""

    index: Count
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class Delta(TypedDict):
    """More of one answer."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[Annotated[list[ToolCallDeltaEntry | CustomCallDeltaEntry], Field(min_length=1)]]
    function_call: NotRequired[FunctionDelta]


class ChunkChoice(TypedDict):
    """What happened to one of n answers."""

    index: Count
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(TypedDict):
    """One event of a chat stream. `usage` is there when `stream_options.include_usage` asks for it."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: Count
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: NotRequired[CompletionUsage | None]


def to_completion(
    events: Iterable[IndexedEvent], envelope: Envelope, options: ChunkOptions, token_bytes: TokenBytes
) -> ChatCompletion:
    """The whole answer, every choice of it finished."""
    choices: list[ChatChoice] = []
    usages: list[Usage] = []
    for index, parts, finished in by_choice(events):
        tokens = [token for part in parts if isinstance(part, TextDelta) for token in part.tokens]
        choices.append(
            {
                "index": index,
                "message": _message(parts, options),
                "logprobs": _logprobs(tokens, token_bytes) if options.logprobs else None,
                "finish_reason": _reason(finished, options),
            }
        )
        usages.append(finished.usage)
    return {
        "id": envelope.id,
        "object": "chat.completion",
        "created": envelope.created,
        "model": envelope.model,
        "choices": choices,
        "usage": to_completion_usage(total_usage([usages])),
        "service_tier": "default",
        "system_fingerprint": envelope.system_fingerprint,
    }


def _message(parts: Sequence[AnswerDelta], options: ChunkOptions) -> AnswerMessage:
    text = "".join(part.text for part in parts if isinstance(part, TextDelta))
    deltas: dict[int, list[ToolCallDelta]] = {}
    for part in parts:
        if isinstance(part, ToolCallDelta):
            deltas.setdefault(part.index, []).append(part)
    calls: list[AnswerToolCall | AnswerCustomCall] = []
    for _, (first, *rest) in sorted(deltas.items()):
        name, arguments = first.name or "", "".join(delta.arguments for delta in (first, *rest))
        if first.is_custom:
            calls.append({"id": first.id or "", "type": "custom", "custom": {"name": name, "input": arguments}})
            continue
        function: CalledFunction = {"name": name, "arguments": arguments}
        calls.append({"id": first.id or "", "type": "function", "function": function})
    content = None if calls and not text else text
    message: AnswerMessage = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
    if thought := "".join(part.text for part in parts if isinstance(part, ReasoningDelta)):
        message["reasoning_content"] = message["reasoning"] = thought
    if calls and options.has_legacy_functions and calls[0]["type"] == "function":
        message["function_call"] = calls[0]["function"]
    elif calls:
        message["tool_calls"] = calls
    return message


class ChatCompletionStream:
    """Folds events into the chunks of a stream, as text of server-sent events. One object a stream, used by one loop.

    The order is the one every client was seen to read: the role with "" first (choices in order), `{}` with the
    finish reason last, then usage if it was asked for.
    """

    def __init__(
        self, envelope: Envelope, options: ChunkOptions, token_bytes: TokenBytes, num_prompt_tokens: int
    ) -> None:
        self._envelope = envelope
        self._options = options
        self._token_bytes = token_bytes
        self._usage = RunningUsage(num_prompt_tokens) if options.include_usage else None
        self._is_plain = not options.logprobs and not options.continuous_usage
        self._text_chunks: list[tuple[str, str]] = []  # of each choice introduced: a text chunk around its text

    def push(self, index: int, event: ChatEvent) -> list[str]:
        """The chunks of one event; an event that shows the client nothing gives none."""
        if self._is_plain and index < len(self._text_chunks) and type(event) is TextDelta and event.text:
            # nearly every chunk there is
            before, after = self._text_chunks[index]
            return [f"{before}{to_json(event.text)}{after}"]
        if self._usage:
            self._usage.push(index, event)
        match event:
            case TextDelta(text, tokens):
                shown = tokens if self._options.logprobs else ()
                if not text and not shown:
                    return []
                chunk = self._chunk(index, {"content": text}, _logprobs(shown, self._token_bytes) if shown else None)
            case ReasoningDelta(text):
                chunk = self._chunk(index, {"reasoning_content": text, "reasoning": text})
            case ToolCallDelta():
                chunk = self._chunk(index, _call_delta(event, self._options))
            case Finished():
                chunk = self._chunk(index, {}, finish_reason=_reason(event, self._options))
        return [*self._introduce(index, isinstance(event, ToolCallDelta)), chunk]

    def end(self) -> list[str]:
        """What follows the last event of the last choice."""
        usage = [self._event([], self._usage.final)] if self._usage else []
        return [*usage, sse.DONE]

    def fail(self, failure: APIError) -> list[str]:
        """What ends a stream that cannot be completed."""
        return [sse.event(error_json(failure))]

    def _introduce(self, index: int, with_call: bool) -> list[str]:
        chunks: list[str] = []
        for number in range(len(self._text_chunks), index + 1):
            # null is right in one place only: before a tool call
            content = None if with_call and number == index else ""
            chunks.append(self._chunk(number, {"role": "assistant", "content": content}))
            self._text_chunks.append(sse.around_empty_text(self._chunk(number, {"content": ""})))
        return chunks

    def _chunk(
        self,
        index: int,
        delta: Delta,
        logprobs: ChoiceLogprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> str:
        choice: ChunkChoice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._event([choice], self._usage.so_far if self._usage and self._options.continuous_usage else None)

    def _event(self, choices: list[ChunkChoice], usage: CompletionUsage | None) -> str:
        chunk: ChatCompletionChunk = {
            "id": self._envelope.id,
            "object": "chat.completion.chunk",
            "created": self._envelope.created,
            "model": self._envelope.model,
            "system_fingerprint": self._envelope.system_fingerprint,
            "choices": choices,
        }
        if self._options.include_usage:
            chunk["usage"] = usage
        return sse.event(to_json(chunk))


def _logprobs(tokens: Sequence[TextToken], token_bytes: TokenBytes) -> ChoiceLogprobs:
    return {"content": to_entries(tokens, token_bytes), "refusal": None}


def _reason(event: Finished, options: ChunkOptions) -> FinishReason:
    if event.reason != "tool_calls":
        return event.reason
    return "stop" if options.has_named_tool else "function_call" if options.has_legacy_functions else "tool_calls"


def _call_delta(event: ToolCallDelta, options: ChunkOptions) -> Delta:
    if event.is_custom:
        custom: CustomCallDeltaEntry = {"index": event.index, "custom": {"input": event.arguments}}
        if event.id is not None:
            custom = {
                "index": event.index,
                "id": event.id,
                "type": "custom",
                "custom": {"name": event.name or "", "input": event.arguments},
            }
        return {"tool_calls": [custom]}
    function: FunctionDelta = {"arguments": event.arguments}
    entry: ToolCallDeltaEntry = {"index": event.index, "function": function}
    if event.id is not None:
        function = {"name": event.name or "", "arguments": event.arguments}
        entry = {"index": event.index, "id": event.id, "type": "function", "function": function}
    return {"function_call": function} if options.has_legacy_functions else {"tool_calls": [entry]}
