"""Events of an answer -> Anthropic's message, or the server-sent events that build it; and their published types.

Streaming and not streaming use the same fold: a message that is not streamed is what its events build.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from typing_extensions import TypeAliasType, TypedDict

from serving.generation.interface import (
    ChatEvent,
    Finished,
    IndexedEvent,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from serving.http import server_sent_events as sse
from serving.http.errors import APIError, messages_envelope
from serving.http.server_sent_events import to_json
from serving.openai.common import Count

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnswerText(TypedDict):
    """Text of the answer."""

    type: Literal["text"]
    text: str
    citations: None


class AnswerToolUse(TypedDict):
    """A call that the model wants made. A call that was cut off has its text as `input.arguments`."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class AnswerThinking(TypedDict):
    """What the model thought before it answered; nothing signs it."""

    type: Literal["thinking"]
    thinking: str
    signature: str


AnswerBlock = AnswerText | AnswerToolUse | AnswerThinking


class MessagesUsage(TypedDict):
    """`input_tokens`: those of the prompt that had to be computed; the others are `cache_read_input_tokens`."""

    input_tokens: Count
    output_tokens: Count
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: Count


class AnthropicMessage(TypedDict):
    """The whole answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage


class MessageStartEvent(TypedDict):
    """The message before anything is in it."""

    type: Literal["message_start"]
    message: AnthropicMessage


class BlockStartEvent(TypedDict):
    """A block begins, empty."""

    type: Literal["content_block_start"]
    index: Count
    content_block: AnswerBlock


class BlockTextDelta(TypedDict):
    """More of a text."""

    type: Literal["text_delta"]
    text: str


class BlockInputDelta(TypedDict):
    """More of a call's arguments, which are JSON text."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockThinkingDelta(TypedDict):
    """More of a thought."""

    type: Literal["thinking_delta"]
    thinking: str


class BlockDeltaEvent(TypedDict):
    """More of a block."""

    type: Literal["content_block_delta"]
    index: Count
    delta: BlockTextDelta | BlockInputDelta | BlockThinkingDelta


class BlockStopEvent(TypedDict):
    """A block is complete."""

    type: Literal["content_block_stop"]
    index: Count


class MessageEnd(TypedDict):
    """Why the answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDeltaEvent(TypedDict):
    """The end of the answer, with the final counts."""

    type: Literal["message_delta"]
    delta: MessageEnd
    usage: MessagesUsage


class MessageStopEvent(TypedDict):
    """The last event."""

    type: Literal["message_stop"]


MessageEvent = TypeAliasType(
    "MessageEvent",
    MessageStartEvent | BlockStartEvent | BlockDeltaEvent | BlockStopEvent | MessageDeltaEvent | MessageStopEvent,
)


class InputTokenCount(TypedDict):
    """How many tokens a prompt has."""

    input_tokens: Count


def unfinished_message(message_id: str, model: str, num_prompt_tokens: int) -> AnthropicMessage:
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(Usage(num_prompt_tokens, 0)),
    }


class MessageStream:
    """Folds one answer's events into events, as text of server-sent events. One object a message, used by one loop."""

    def __init__(self, message: AnthropicMessage) -> None:
        self.message = message
        self._events: list[str] = []  # of this push
        self._has_started = False
        self._block: AnswerBlock | None = None  # is being written
        self._call_index = 0  # among the answer's calls, of a block that is one
        self._pieces: list[str] = []  # of the block's text or arguments

    def push(self, index: int, event: ChatEvent) -> list[str]:
        """The events of one event of the only answer, index 0."""
        self._events = []
        if not self._has_started:
            self._has_started = True
            self._emit({"type": "message_start", "message": self.message})
        match event:
            case TextDelta(text):
                if text:
                    self._begin("text")
                    self._push({"type": "text_delta", "text": text}, text)
            case ReasoningDelta(text):
                self._begin("thinking")
                self._push({"type": "thinking_delta", "thinking": text}, text)
            case ToolCallDelta():
                self._push_call(event)
            case Finished():
                self._finish(event)
        return self._events

    def end(self) -> list[str]:
        return []

    def fail(self, failure: APIError) -> list[str]:
        """What ends a stream that cannot be completed."""
        return [sse.event(messages_envelope(failure), "error")]

    @property
    def _index(self) -> int:
        return len(self.message["content"])

    def _begin(self, kind: Literal["text", "thinking"]) -> None:
        if self._block is not None and self._block["type"] == kind:
            return
        self._close()
        if kind == "text":
            self._open({"type": "text", "text": "", "citations": None})
        else:
            self._open({"type": "thinking", "thinking": "", "signature": ""})

    def _push_call(self, delta: ToolCallDelta) -> None:
        if self._block is None or self._block["type"] != "tool_use" or self._call_index != delta.index:
            self._close()
            self._open({"type": "tool_use", "id": delta.id or "", "name": delta.name or "", "input": {}})
            self._call_index = delta.index
        if delta.arguments:
            self._push({"type": "input_json_delta", "partial_json": delta.arguments}, delta.arguments)

    def _push(self, delta: BlockTextDelta | BlockInputDelta | BlockThinkingDelta, text: str) -> None:
        self._pieces.append(text)
        self._emit({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _open(self, block: AnswerBlock) -> None:
        self._block, self._pieces = block, []
        self._emit({"type": "content_block_start", "index": self._index, "content_block": block})

    def _close(self) -> None:
        """Complete the block that is being written, if there is one."""
        block, text = self._block, "".join(self._pieces)
        if block is None:
            return
        if block["type"] == "text":
            block["text"] = text
        elif block["type"] == "thinking":
            block["thinking"] = text
        else:
            parsed = ToolCall(block["id"], block["name"], text).parsed_arguments
            block["input"] = {"arguments": parsed} if isinstance(parsed, str) else parsed
        self._emit({"type": "content_block_stop", "index": self._index})
        self.message["content"].append(block)
        self._block = None

    def _finish(self, finished: Finished) -> None:
        self._close()
        reason: StopReason = "max_tokens" if finished.reason == "length" else "end_turn"
        if finished.reason == "tool_calls":
            reason = "tool_use"
        elif finished.stop_string is not None:
            reason = "stop_sequence"
        usage = _usage(finished.usage)
        self.message |= {"stop_reason": reason, "stop_sequence": finished.stop_string, "usage": usage}
        end: MessageEnd = {"stop_reason": reason, "stop_sequence": finished.stop_string}
        self._emit({"type": "message_delta", "delta": end, "usage": usage})
        self._emit({"type": "message_stop"})

    def _emit(self, event: MessageEvent) -> None:
        self._events.append(sse.event(to_json(event), event["type"]))


def to_message(events: Iterable[IndexedEvent], fold: MessageStream) -> AnthropicMessage:
    """The whole message of a finished answer."""
    for index, event in events:
        fold.push(index, event)
    return fold.message


def _usage(usage: Usage) -> MessagesUsage:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
    }
