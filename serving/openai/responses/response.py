"""Events of a chat answer -> OpenAI's response object, and the events that tell how it came about. Pure.

Streaming and not streaming use the same fold: a response that is not streamed is the last event's.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from serving.engine.interface import TokenLogprob
from serving.generation.interface import ChatEvent, Finished, TextDelta, ToolCallDelta, Usage
from serving.http.errors import APIError
from serving.http.server_sent_events import to_json
from serving.openai.chat.response import IndexedEvent, TokenBytes, logprobs_json
from serving.openai.responses.request import ResponsesRequest


def response_head(body: ResponsesRequest, response_id: str, created: int) -> dict[str, Any]:
    """The response before anything is in it: what was asked for, with the defaults filled in."""
    text = {"format": {"type": "text"}, **({} if body.text is None else body.text.model_dump(exclude_none=True))}
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": body.temperature,
        "text": text,
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": [
            {"description": None, "parameters": None, "strict": None, **tool.model_dump()} for tool in body.tools
        ],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }


def response_usage(usage: Usage) -> dict[str, Any]:
    """The counts under this endpoint's names."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


@dataclass
class OpenMessage:
    """A message that is being written."""

    id: str
    place: int  # in the response's output
    text: list[str]
    logprobs: list[TokenLogprob]


@dataclass
class OpenCall:
    """A function call that is being written."""

    id: str
    place: int
    index: int  # among the answer's calls
    call_id: str
    name: str
    arguments: list[str]

    def item(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "arguments": "".join(self.arguments),
            "call_id": self.call_id,
            "name": self.name,
        }


class ResponseStream:
    """Folds one answer's events into the JSON text of response events, each of which begins with its type.

    One object a response, used by one loop. Items of the output come one after the other: text, then calls.
    """

    def __init__(self, head: dict[str, Any], shows_logprobs: bool, token_bytes: TokenBytes) -> None:
        self.response = head
        self._shows_logprobs = shows_logprobs
        self._token_bytes = token_bytes
        self._number = 0
        self._open: OpenMessage | OpenCall | None = None

    def push(self, index: int, event: ChatEvent) -> list[str]:
        """The response events of one event of the only answer, index 0."""
        events: list[str] = []
        if self._number == 0:
            events += [self._about_response("response.created"), self._about_response("response.in_progress")]
        match event:
            case TextDelta(text, logprobs):
                if text or (logprobs and self._shows_logprobs):
                    events += self._text(text, logprobs if self._shows_logprobs else ())
            case ToolCallDelta():
                events += self._call(event)
            case Finished():
                events += self._finish(event)
        return events

    def end(self) -> list[str]:
        return []

    def fail(self, failure: APIError) -> list[str]:
        """What ends a stream that cannot be completed."""
        self.response["status"] = "failed"
        self.response["error"] = {"code": failure.code or "server_error", "message": failure.message}
        return [self._about_response("response.failed")]

    def _text(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> list[str]:
        events: list[str] = []
        message = self._open
        if not isinstance(message, OpenMessage):
            events += self._close("completed")
            message, opened = self._open_message()
            events += opened
        message.text.append(text)
        message.logprobs.extend(logprobs)
        entries = logprobs_json(logprobs, self._token_bytes)
        where = {"item_id": message.id, "output_index": message.place, "content_index": 0}
        events.append(self._event("response.output_text.delta", {**where, "delta": text, "logprobs": entries}))
        return events

    def _call(self, delta: ToolCallDelta) -> list[str]:
        events: list[str] = []
        call = self._open
        if not isinstance(call, OpenCall) or call.index != delta.index:
            events += self._close("completed")
            place = len(self.response["output"])
            call = OpenCall(_fresh("fc"), place, delta.index, delta.id or _fresh("call"), delta.name or "", [])
            events.append(self._added(call, call.item("in_progress")))
        if delta.arguments:
            call.arguments.append(delta.arguments)
            where = {"item_id": call.id, "output_index": call.place}
            events.append(self._event("response.function_call_arguments.delta", {**where, "delta": delta.arguments}))
        return events

    def _finish(self, finished: Finished) -> list[str]:
        events: list[str] = []
        is_cut = finished.reason == "length"
        if self._open is None and not self.response["output"]:
            events += self._open_message()[1]  # an answer without a word is an empty message
        events += self._close("incomplete" if is_cut else "completed")
        self.response["status"] = "incomplete" if is_cut else "completed"
        self.response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        self.response["completed_at"] = None if is_cut else int(time.time())
        self.response["usage"] = response_usage(finished.usage)
        events.append(self._about_response("response.incomplete" if is_cut else "response.completed"))
        return events

    def _open_message(self) -> tuple[OpenMessage, list[str]]:
        message = OpenMessage(_fresh("msg"), len(self.response["output"]), [], [])
        item = {"id": message.id, "type": "message", "status": "in_progress", "content": [], "role": "assistant"}
        where = {"item_id": message.id, "output_index": message.place, "content_index": 0}
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
        return message, [
            self._added(message, item),
            self._event("response.content_part.added", {**where, "part": part}),
        ]

    def _added(self, opened: OpenMessage | OpenCall, item: dict[str, Any]) -> str:
        self._open = opened
        return self._event("response.output_item.added", {"output_index": opened.place, "item": item})

    def _close(self, status: str) -> list[str]:
        """The end of the item that is being written, if there is one."""
        opened, self._open = self._open, None
        if opened is None:
            return []
        events: list[str] = []
        where: dict[str, Any] = {"item_id": opened.id, "output_index": opened.place}
        match opened:
            case OpenMessage():
                where["content_index"] = 0
                text, entries = "".join(opened.text), logprobs_json(opened.logprobs, self._token_bytes)
                part = {"type": "output_text", "annotations": [], "logprobs": entries, "text": text}
                done = {**where, "text": text, "logprobs": entries}
                events.append(self._event("response.output_text.done", done))
                events.append(self._event("response.content_part.done", {**where, "part": part}))
                item = {"id": opened.id, "type": "message", "status": status, "content": [part], "role": "assistant"}
            case OpenCall():
                item = opened.item(status)
                done = {**where, "name": opened.name, "arguments": item["arguments"]}
                events.append(self._event("response.function_call_arguments.done", done))
        self.response["output"].append(item)
        events.append(self._event("response.output_item.done", {"output_index": opened.place, "item": item}))
        return events

    def _about_response(self, kind: str) -> str:
        return self._event(kind, {"response": self.response})

    def _event(self, kind: str, fields: dict[str, Any]) -> str:
        self._number += 1
        return to_json({"type": kind, **fields, "sequence_number": self._number - 1})


def to_response(events: Iterable[IndexedEvent], fold: ResponseStream) -> dict[str, Any]:
    """The whole response of a finished answer."""
    for index, event in events:
        fold.push(index, event)
    return fold.response


def _fresh(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
