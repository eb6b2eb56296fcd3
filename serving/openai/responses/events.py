"""Events of an answer -> the finished response, or the server-sent events that build it.

Streaming and not streaming use the same fold: a response that is not streamed is the last event's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from serving.generation.interface import (
    ChatEvent,
    Finished,
    IndexedEvent,
    ReasoningDelta,
    TextDelta,
    TextToken,
    ToolCallDelta,
)
from serving.http import server_sent_events as sse
from serving.http.errors import APIError
from serving.http.server_sent_events import to_json
from serving.openai.common import TokenBytes
from serving.openai.logprobs import TokenLogprobEntry, to_entries
from serving.openai.responses.event_types import InItem, InText, ItemName, PartName, ResponseEvent, StateName
from serving.openai.responses.request import Status
from serving.openai.responses.response import (
    OutputCall,
    OutputCustomCall,
    OutputItem,
    OutputMessage,
    OutputText,
    Response,
    fresh_id,
    to_response_usage,
)

CALLS = ("function_call", "custom_tool_call")


class ResponseStream:
    """Folds one answer's events into response events, as text of server-sent events.

    One object a response, used by one loop. Items of the output come one after the other: text, then calls.
    """

    def __init__(self, response: Response, shows_logprobs: bool, token_bytes: TokenBytes) -> None:
        self.response = response
        self._shows_logprobs = shows_logprobs
        self._token_bytes = token_bytes
        self._number = 0  # of the next event
        self._events: list[str] = []  # of this push
        self._item: OutputItem | None = None  # is being written
        self._call_index = 0  # among the answer's calls, of an item that is one
        self._pieces: list[str] = []  # of the item's text or arguments
        self._tokens: list[TextToken] = []  # of the item's text

    def push(self, index: int, event: ChatEvent) -> list[str]:
        """The response events of one event of the only answer, index 0."""
        self._events = []
        if self._number == 0:
            self._emit_state("response.created")
            self._emit_state("response.in_progress")
        match event:
            case TextDelta(text, tokens):
                shown = tokens if self._shows_logprobs else ()
                if text or shown:
                    self._push_text(text, shown)
            case ReasoningDelta(text):
                self._push_reasoning(text)
            case ToolCallDelta():
                self._push_call(event)
            case Finished():
                self._finish(event)
        return self._events

    def end(self) -> list[str]:
        return []

    def fail(self, failure: APIError) -> list[str]:
        """What ends a stream that cannot be completed."""
        self._events = []
        self.response["status"] = "failed"
        self.response["error"] = {"code": failure.code or "server_error", "message": failure.message}
        self._emit_state("response.failed")
        return self._events

    def _push_text(self, text: str, tokens: Sequence[TextToken]) -> None:
        if self._item is None or self._item["type"] != "message":
            self._close("completed")
            self._open_message()
        self._pieces.append(text)
        self._tokens.extend(tokens)
        self._emit(
            {
                "type": "response.output_text.delta",
                **self._text_position,
                "delta": text,
                "logprobs": to_entries(tokens, self._token_bytes),
                "sequence_number": self._number,
            }
        )

    def _push_reasoning(self, text: str) -> None:
        if self._item is None or self._item["type"] != "reasoning":
            self._close("completed")
            self._open(
                {"id": fresh_id("rs"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
            )
        self._pieces.append(text)
        self._emit(
            {
                "type": "response.reasoning_text.delta",
                **self._text_position,
                "delta": text,
                "sequence_number": self._number,
            }
        )

    def _push_call(self, delta: ToolCallDelta) -> None:
        if self._item is None or self._item["type"] not in CALLS or self._call_index != delta.index:
            self._close("completed")
            self._open(_begun_call(delta))
            self._call_index = delta.index
        if delta.arguments:
            self._pieces.append(delta.arguments)
            if delta.is_custom:
                self._emit(
                    {
                        "type": "response.custom_tool_call_input.delta",
                        **self._position,
                        "delta": delta.arguments,
                        "sequence_number": self._number,
                    }
                )
                return
            self._emit(
                {
                    "type": "response.function_call_arguments.delta",
                    **self._position,
                    "delta": delta.arguments,
                    "sequence_number": self._number,
                }
            )

    def _finish(self, finished: Finished) -> None:
        if self._item is None and not self.response["output"]:
            self._open_message()  # an answer without a word is an empty message
        is_cut = finished.reason == "length"
        self._close("incomplete" if is_cut else "completed")
        self.response["status"] = "incomplete" if is_cut else "completed"
        self.response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        self.response["completed_at"] = None if is_cut else int(time.time())
        self.response["usage"] = to_response_usage(finished.usage)
        self._emit_state("response.incomplete" if is_cut else "response.completed")

    def _open_message(self) -> None:
        message: OutputMessage = {
            "id": fresh_id("msg"),
            "type": "message",
            "status": "in_progress",
            "content": [],
            "role": "assistant",
        }
        self._open(message)
        self._emit_part("response.content_part.added", _part("", []))

    def _open(self, item: OutputItem) -> None:
        self._item, self._pieces, self._tokens = item, [], []
        self._emit_item("response.output_item.added", item)

    def _close(self, status: Status) -> None:
        """Complete the item that is being written, if there is one."""
        item, text = self._item, "".join(self._pieces)
        if item is None:
            return
        if item["type"] == "message":
            entries = to_entries(self._tokens, self._token_bytes)
            self._emit(
                {
                    "type": "response.output_text.done",
                    **self._text_position,
                    "text": text,
                    "logprobs": entries,
                    "sequence_number": self._number,
                }
            )
            item["content"] = [_part(text, entries)]
            self._emit_part("response.content_part.done", item["content"][0])
        elif item["type"] == "reasoning":
            item["content"] = [{"type": "reasoning_text", "text": text}]
            self._emit(
                {
                    "type": "response.reasoning_text.done",
                    **self._text_position,
                    "text": text,
                    "sequence_number": self._number,
                }
            )
        elif item["type"] == "custom_tool_call":
            item["input"] = text
            self._emit(
                {
                    "type": "response.custom_tool_call_input.done",
                    **self._position,
                    "input": text,
                    "sequence_number": self._number,
                }
            )
        else:
            item["arguments"] = text
            self._emit(
                {
                    "type": "response.function_call_arguments.done",
                    **self._position,
                    "name": item["name"],
                    "arguments": text,
                    "sequence_number": self._number,
                }
            )
        item["status"] = status
        self._emit_item("response.output_item.done", item)
        self.response["output"].append(item)
        self._item = None

    @property
    def _position(self) -> InItem:
        return {"item_id": self._item["id"] if self._item else "", "output_index": len(self.response["output"])}

    @property
    def _text_position(self) -> InText:
        return {**self._position, "content_index": 0}

    def _emit_state(self, name: StateName) -> None:
        self._emit({"type": name, "response": self.response, "sequence_number": self._number})

    def _emit_item(self, name: ItemName, item: OutputItem) -> None:
        index = len(self.response["output"])
        self._emit({"type": name, "output_index": index, "item": item, "sequence_number": self._number})

    def _emit_part(self, name: PartName, part: OutputText) -> None:
        self._emit({"type": name, **self._text_position, "part": part, "sequence_number": self._number})

    def _emit(self, event: ResponseEvent) -> None:
        self._number += 1
        self._events.append(sse.event(to_json(event), event["type"]))


def _begun_call(delta: ToolCallDelta) -> OutputCall | OutputCustomCall:
    call_id, name = delta.id or fresh_id("call"), delta.name or ""
    if delta.is_custom:
        return {
            "id": fresh_id("ctc"),
            "type": "custom_tool_call",
            "status": "in_progress",
            "input": "",
            "call_id": call_id,
            "name": name,
        }
    return {
        "id": fresh_id("fc"),
        "type": "function_call",
        "status": "in_progress",
        "arguments": "",
        "call_id": call_id,
        "name": name,
    }


def _part(text: str, logprobs: list[TokenLogprobEntry]) -> OutputText:
    return {"type": "output_text", "annotations": [], "logprobs": logprobs, "text": text}


def to_response(events: Iterable[IndexedEvent], fold: ResponseStream) -> Response:
    """The whole response of a finished answer."""
    for index, event in events:
        fold.push(index, event)
    return fold.response
