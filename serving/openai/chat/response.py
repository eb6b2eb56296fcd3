"""Events of a chat answer -> OpenAI's JSON, whole or chunk by chunk. Pure: both fold the same events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.engine.interface import TokenLogprob
from serving.generation.interface import ChatEvent, Finished, TextDelta, ToolCallDelta, Usage
from serving.http.server_sent_events import to_json

IndexedEvent = tuple[int, ChatEvent]  # (index of the choice, what happened to it)
TokenBytes = Callable[[int], bytes]
LOWEST_LOGPROB = -9999.0  # what OpenAI writes where the true value has no JSON: minus infinity


@dataclass(frozen=True)
class Envelope:
    """What every chunk of one answer repeats."""

    id: str
    created: int  # Unix seconds
    model: str  # the name that the client asked for
    system_fingerprint: str


@dataclass(frozen=True)
class ChunkOptions:
    """What the client wants to see beside the text."""

    logprobs: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    has_legacy_functions: bool = False  # calls are told as `function_call`, as before there were tools


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage` object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def total_usage(usages: Iterable[Usage]) -> Usage:
    """The counts of one request with several choices of one prompt: the prompt counts once."""
    all_usages = list(usages)
    if not all_usages:
        return Usage(0, 0)
    return Usage(
        all_usages[0].prompt_tokens,
        sum(usage.completion_tokens for usage in all_usages),
        # later choices find the prompt that the first one computed; what was there before is the least of them
        min(usage.cached_tokens for usage in all_usages),
    )


def logprobs_json(logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes) -> list[dict[str, Any]]:
    """Entries of `logprobs.content`."""
    return [
        {
            **_token_json(entry.token_id, entry.logprob, token_bytes),
            "top_logprobs": [_token_json(token_id, logprob, token_bytes) for token_id, logprob in entry.top],
        }
        for entry in logprobs
    ]


def _token_json(token_id: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    raw = token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(raw)}


@dataclass
class ChatChoice:
    """One choice of a completion, while its events are folded."""

    text: list[str] = field(default_factory=list[str])
    calls: dict[int, tuple[str, str, list[str]]] = field(default_factory=dict[int, tuple[str, str, list[str]]])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    finished: Finished | None = None

    def push(self, event: ChatEvent) -> None:
        match event:
            case TextDelta(text, logprobs):
                self.text.append(text)
                self.logprobs.extend(logprobs)
            case ToolCallDelta(index, call_id, name, arguments):
                _, _, pieces = self.calls.setdefault(index, (call_id or "", name or "", []))
                pieces.append(arguments)
            case Finished():
                self.finished = event

    def to_choice(self, index: int, options: ChunkOptions, token_bytes: TokenBytes) -> dict[str, Any]:
        text = "".join(self.text)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self.calls and not text else text,
            "refusal": None,
            "annotations": [],
        }
        if self.calls and options.has_legacy_functions:
            _, name, pieces = self.calls[0]
            message["function_call"] = {"name": name, "arguments": "".join(pieces)}
        elif self.calls:
            message["tool_calls"] = [
                {"id": call_id, "type": "function", "function": {"name": name, "arguments": "".join(pieces)}}
                for _, (call_id, name, pieces) in sorted(self.calls.items())
            ]
        logprobs = {"content": logprobs_json(self.logprobs, token_bytes), "refusal": None} if options.logprobs else None
        reason = None if self.finished is None else _reason(self.finished, options)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def to_completion(
    events: Iterable[IndexedEvent], envelope: Envelope, options: ChunkOptions, token_bytes: TokenBytes
) -> dict[str, Any]:
    """The whole answer, every choice of it finished."""
    answers: dict[int, ChatChoice] = {}
    for index, event in events:
        answers.setdefault(index, ChatChoice()).push(event)
    usage = total_usage(answer.finished.usage for _, answer in sorted(answers.items()) if answer.finished is not None)
    return {
        "id": envelope.id,
        "object": "chat.completion",
        "created": envelope.created,
        "model": envelope.model,
        "choices": [answer.to_choice(index, options, token_bytes) for index, answer in sorted(answers.items())],
        "usage": usage_json(usage),
        "service_tier": "default",
        "system_fingerprint": envelope.system_fingerprint,
    }


class RunningUsage:
    """Token counts of a stream so far: exact for finished choices, by the tokens read for the others."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._counts: dict[int, int] = {}
        self._finished: dict[int, Usage] = {}

    def push(self, index: int, event: ChatEvent) -> None:
        match event:
            case TextDelta(_, logprobs):
                self._counts[index] = self._counts.get(index, 0) + len(logprobs)
            case Finished(_, usage):
                self._counts[index] = usage.completion_tokens
                self._finished[index] = usage
            case ToolCallDelta():
                pass

    @property
    def so_far(self) -> Usage:
        return Usage(self._prompt_tokens, sum(self._counts.values()), self.final.cached_tokens)

    @property
    def final(self) -> Usage:
        return total_usage(self._finished.values())


class ChatCompletionStream:
    """Folds events into the JSON text of chunks. One object a stream, used by one loop.

    The order is the one every client was seen to read: the role with "" first (choices in order), `{}` with the
    finish reason last, then usage if it was asked for.
    """

    def __init__(self, envelope: Envelope, options: ChunkOptions, token_bytes: TokenBytes, prompt_tokens: int) -> None:
        self._options = options
        self._token_bytes = token_bytes
        self._usage = RunningUsage(prompt_tokens)
        self._introduced = 0  # choices 0 .. introduced - 1 have had their role
        head = {
            "id": envelope.id,
            "object": "chat.completion.chunk",
            "created": envelope.created,
            "model": envelope.model,
            "system_fingerprint": envelope.system_fingerprint,
        }
        self._head = to_json(head)[:-1] + ',"choices":['
        self._is_plain = not options.logprobs and not options.continuous_usage
        ending = '],"usage":null}' if options.include_usage else "]}"
        self._plain_tail = '},"logprobs":null,"finish_reason":null}' + ending

    def push(self, index: int, event: ChatEvent) -> list[str]:
        """The chunks of one event; an event that shows the client nothing gives none."""
        if self._is_plain and index < self._introduced and type(event) is TextDelta and event.text:
            # nearly every chunk there is
            return [f'{self._head}{{"index":{index},"delta":{{"content":{to_json(event.text)}{self._plain_tail}']
        self._usage.push(index, event)
        if isinstance(event, TextDelta) and not event.text and not (event.logprobs and self._options.logprobs):
            return []
        chunks = self._introduce(index, isinstance(event, ToolCallDelta))
        match event:
            case TextDelta(text, logprobs):
                shown = logprobs if self._options.logprobs else ()
                chunks.append(self._choice(index, f'{{"content":{to_json(text)}}}', self._logprobs(shown)))
            case ToolCallDelta():
                chunks.append(self._choice(index, to_json(self._call(event))))
            case Finished():
                chunks.append(self._choice(index, "{}", finish_reason=f'"{_reason(event, self._options)}"'))
        return chunks

    def end(self) -> list[str]:
        """What follows the last event of the last choice."""
        if not self._options.include_usage:
            return []
        return [f'{self._head}],"usage":{to_json(usage_json(self._usage.final))}}}']

    def _call(self, event: ToolCallDelta) -> dict[str, Any]:
        if not self._options.has_legacy_functions:
            return {"tool_calls": [_call_delta(event)]}
        return {"function_call": _call_delta(event)["function"]}

    def _introduce(self, index: int, with_call: bool) -> list[str]:
        chunks: list[str] = []
        for number in range(self._introduced, index + 1):
            # null is right in one place only: before a tool call
            content = "null" if with_call and number == index else '""'
            chunks.append(self._choice(number, f'{{"role":"assistant","content":{content}}}'))
        self._introduced = max(self._introduced, index + 1)
        return chunks

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> str:
        if not logprobs:
            return "null"
        return to_json({"content": logprobs_json(logprobs, self._token_bytes), "refusal": None})

    def _choice(self, index: int, delta: str, logprobs: str = "null", finish_reason: str = "null") -> str:
        tail = "]}"
        if self._options.continuous_usage:
            tail = f'],"usage":{to_json(usage_json(self._usage.so_far))}}}'
        elif self._options.include_usage:
            tail = '],"usage":null}'
        rest = f'"logprobs":{logprobs},"finish_reason":{finish_reason}}}{tail}'
        return f'{self._head}{{"index":{index},"delta":{delta},{rest}'


def _reason(event: Finished, options: ChunkOptions) -> str:
    return "function_call" if event.reason == "tool_calls" and options.has_legacy_functions else event.reason


def _call_delta(event: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, str] = {"arguments": event.arguments}
    if event.id is None:
        return {"index": event.index, "function": function}
    function = {"name": event.name or "", **function}
    return {"index": event.index, "id": event.id, "type": "function", "function": function}
