"""Events of raw text completions -> the JSON of OpenAI's legacy /completions. Pure; whole and in chunks."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.engine.interface import TokenLogprob
from serving.generation.interface import ChatEvent, Finished, TextDelta, ToolCallDelta, Usage
from serving.http.server_sent_events import to_json
from serving.openai.chat.response import (
    LOWEST_LOGPROB,
    ChunkOptions,
    Envelope,
    IndexedEvent,
    TokenBytes,
    total_usage,
    usage_json,
)


@dataclass
class TextAnswer:
    """One choice of a completion, while its events are folded. Raw prompts have no tools, so no calls come."""

    deltas: list[TextDelta] = field(default_factory=list[TextDelta])
    finished: Finished | None = None

    def push(self, event: ChatEvent) -> None:
        match event:
            case TextDelta():
                self.deltas.append(event)
            case Finished():
                self.finished = event
            case ToolCallDelta():
                pass

    @property
    def mean_logprob(self) -> float:
        """How likely the model found its own answer, per token; the measure of `best_of`."""
        logprobs = [entry.logprob for delta in self.deltas for entry in delta.logprobs]
        return sum(logprobs) / len(logprobs) if logprobs else float("-inf")


class LegacyLogprobs:
    """Folds one choice's log-probabilities into the four parallel lists of the legacy shape.

    `text_offset` counts characters of the answer. Tokens that were read together share out the text that they gave,
    so a character spelled in several tokens is where the first of them is, and no error outlives one delta.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._offset = 0  # where the next delta begins

    def push(self, deltas: Iterable[TextDelta]) -> dict[str, Any]:
        """The lists for more of the answer."""
        lists: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for delta in deltas:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            passed = 0
            for entry in delta.logprobs:
                lists["tokens"].append(self._name(entry.token_id))
                lists["token_logprobs"].append(max(entry.logprob, LOWEST_LOGPROB))
                lists["top_logprobs"].append(self._top(entry))
                lists["text_offset"].append(self._offset + min(passed, len(delta.text)))
                passed += len(decoder.decode(self._token_bytes(entry.token_id)))
            self._offset += len(delta.text)
        return lists

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        pairs = (*entry.top, (entry.token_id, entry.logprob))
        return {self._name(token_id): max(logprob, LOWEST_LOGPROB) for token_id, logprob in pairs}

    def _name(self, token_id: int) -> str:
        """The token's text, or its bytes in OpenAI's notation where they are no whole characters."""
        raw = self._token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclass(frozen=True)
class TextPlan:
    """How the choices of one request are counted: prompt p's answers have indices p * n .. p * n + n - 1."""

    n: int
    echoes: tuple[str, ...]  # what stands before the answers, for each prompt; "" without echo


def to_text_completion(
    per_prompt: Sequence[Iterable[IndexedEvent]],
    plan: TextPlan,
    envelope: Envelope,
    options: ChunkOptions,
    token_bytes: TokenBytes,
) -> dict[str, Any]:
    """The whole answer. `per_prompt`: the events of each prompt; of more candidates than n the likeliest are kept."""
    choices: list[dict[str, Any]] = []
    usages: list[Usage] = []
    for echo, events in zip(plan.echoes, per_prompt, strict=True):
        answers: dict[int, TextAnswer] = {}
        for index, event in events:
            answers.setdefault(index, TextAnswer()).push(event)
        usages.append(total_usage(answer.finished.usage for answer in answers.values() if answer.finished is not None))
        ranked = [answer for _, answer in sorted(answers.items())]
        if len(ranked) > plan.n:
            ranked = sorted(ranked, key=lambda answer: -answer.mean_logprob)[: plan.n]
        for answer in ranked:
            choices.append(
                _choice(
                    len(choices), echo + "".join(delta.text for delta in answer.deltas), answer, options, token_bytes
                )
            )
    return {
        "id": envelope.id,
        "object": "text_completion",
        "created": envelope.created,
        "model": envelope.model,
        "choices": choices,
        "usage": usage_json(_sum(usages)),
        "system_fingerprint": envelope.system_fingerprint,
    }


def _choice(
    index: int, text: str, answer: TextAnswer, options: ChunkOptions, token_bytes: TokenBytes
) -> dict[str, Any]:
    logprobs = LegacyLogprobs(token_bytes).push(answer.deltas) if options.logprobs else None
    reason = None if answer.finished is None else answer.finished.reason
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}


def _sum(usages: Iterable[Usage]) -> Usage:
    prompt = completion = cached = 0
    for usage in usages:
        prompt += usage.prompt_tokens
        completion += usage.completion_tokens
        cached += usage.cached_tokens
    return Usage(prompt, completion, cached)


class CompletionStream:
    """Folds events into the JSON text of legacy chunks. One object a stream, used by one loop."""

    def __init__(
        self,
        plan: TextPlan,
        envelope: Envelope,
        options: ChunkOptions,
        token_bytes: TokenBytes,
        prompt_tokens: Sequence[int],
    ) -> None:
        self._plan = plan
        self._options = options
        self._prompt_tokens = prompt_tokens  # of each prompt
        self._logprobs: Mapping[int, LegacyLogprobs] = {
            index: LegacyLogprobs(token_bytes) for index in range(plan.n * len(plan.echoes))
        }
        self._counts: dict[int, int] = {}
        self._finished: dict[int, Usage] = {}
        self._introduced = 0
        head = {
            "id": envelope.id,
            "object": "text_completion",
            "created": envelope.created,
            "model": envelope.model,
            "system_fingerprint": envelope.system_fingerprint,
        }
        self._head = to_json(head)[:-1] + ',"choices":['

    def push(self, index: int, event: ChatEvent) -> list[str]:
        """The chunks of one event; an event that shows the client nothing gives none."""
        chunks = self._introduce(index)
        match event:
            case TextDelta(text, logprobs):
                self._counts[index] = self._counts.get(index, 0) + len(logprobs)
                lists = to_json(self._logprobs[index].push([event])) if self._options.logprobs else "null"
                if text or (logprobs and self._options.logprobs):
                    chunks.append(self._chunk(index, text, lists))
            case Finished(reason, usage):
                self._counts[index] = usage.completion_tokens
                self._finished[index] = usage
                chunks.append(self._chunk(index, "", finish_reason=f'"{reason}"'))
            case ToolCallDelta():
                pass
        return chunks

    def end(self) -> list[str]:
        """What follows the last event of the last choice."""
        if not self._options.include_usage:
            return []
        return [f'{self._head}],"usage":{to_json(usage_json(self._final()))}}}']

    def _introduce(self, index: int) -> list[str]:
        """Choices appear in order: the echo of each, or an empty text for those that a later one overtakes."""
        chunks: list[str] = []
        for number in range(self._introduced, index + 1):
            echo = self._plan.echoes[number // self._plan.n]
            if echo or number < index:
                chunks.append(self._chunk(number, echo))
        self._introduced = max(self._introduced, index + 1)
        return chunks

    def _chunk(self, index: int, text: str, logprobs: str = "null", finish_reason: str = "null") -> str:
        tail = "]}"
        if self._options.continuous_usage:
            tail = f'],"usage":{to_json(usage_json(self._so_far()))}}}'
        elif self._options.include_usage:
            tail = '],"usage":null}'
        return (
            f'{self._head}{{"text":{to_json(text)},"index":{index},"logprobs":{logprobs},'
            f'"finish_reason":{finish_reason}}}{tail}'
        )

    def _so_far(self) -> Usage:
        return Usage(sum(self._prompt_tokens), sum(self._counts.values()), self._final().cached_tokens)

    def _final(self) -> Usage:
        n = self._plan.n
        per_prompt = [
            [self._finished[index] for index in range(prompt * n, prompt * n + n) if index in self._finished]
            for prompt in range(len(self._plan.echoes))
        ]
        return _sum(total_usage(usages) for usages in per_prompt)
