"""Events of raw completions -> OpenAI's legacy completion, whole or in chunks; and its published types."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from serving.generation.interface import (
    AnswerDelta,
    ChatEvent,
    Finished,
    IndexedEvent,
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
from serving.openai.logprobs import LOWEST_LOGPROB, Logprob, alternatives, to_text
from serving.openai.usage import CompletionUsage, RunningUsage, to_completion_usage, total_usage

FinishReason = Literal["stop", "length"]


class LegacyLogprobs(TypedDict):
    """Four parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[Logprob]
    top_logprobs: list[dict[str, Logprob]]
    text_offset: list[Count]


class CompletionChoice(TypedDict):
    """One continuation of one prompt."""

    text: str
    index: Count
    logprobs: LegacyLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """The answer to a raw prompt, whole or, in a stream, one event of it."""

    id: str
    object: Literal["text_completion"]
    created: Count
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[CompletionUsage | None]
    system_fingerprint: str


class LogprobsFold:
    """Folds one choice's log-probabilities into the legacy lists.

    `text_offset` counts characters of the answer; the tokens of one character have the same.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._offset = 0  # where the next delta begins

    def push(self, deltas: Iterable[TextDelta]) -> LegacyLogprobs:
        """The lists for more of the answer."""
        lists: LegacyLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for delta in deltas:
            decoder = codecs.getincrementaldecoder("utf-8")()
            for token in delta.tokens:
                lists["tokens"].append(to_text(token.share, "bytes:"))
                lists["token_logprobs"].append(max(token.logprob.logprob, LOWEST_LOGPROB))
                lists["top_logprobs"].append(self._top(token))
                lists["text_offset"].append(self._offset)
                self._offset += len(decoder.decode(token.share))
        return lists

    def _top(self, token: TextToken) -> dict[str, float]:
        """Of alternatives with the same text, the likeliest; the token itself in any case."""
        likeliest_last = reversed(alternatives(token, self._token_bytes))
        pairs = (*likeliest_last, (token.share, token.logprob.logprob))
        return {to_text(raw, "bytes:"): max(logprob, LOWEST_LOGPROB) for raw, logprob in pairs}


@dataclass(frozen=True)
class PromptChoices:
    """How the choices of one request are counted: prompt p's answers have indices p * n .. p * n + n - 1."""

    n: int
    echoes: tuple[str, ...]  # what stands before the answers, for each prompt; "" without echo


def to_text_completion(
    per_prompt: Sequence[Iterable[IndexedEvent]],
    prompts: PromptChoices,
    envelope: Envelope,
    options: ChunkOptions,
    token_bytes: TokenBytes,
) -> Completion:
    """The whole answer. `per_prompt`: the events of each prompt; of more candidates than n the likeliest are kept."""
    choices: list[CompletionChoice] = []
    usages: list[list[Usage]] = []
    for echo, events in zip(prompts.echoes, per_prompt, strict=True):
        answers = [(_texts(parts), finished) for _, parts, finished in by_choice(events)]
        usages.append([finished.usage for _, finished in answers])
        if len(answers) > prompts.n:
            answers = sorted(answers, key=lambda answer: -_mean_logprob(answer[0]))[: prompts.n]
        for deltas, finished in answers:
            text = echo + "".join(delta.text for delta in deltas)
            lists = LogprobsFold(token_bytes).push(deltas) if options.logprobs else None
            reason = _reason(finished)
            choices.append({"text": text, "index": len(choices), "logprobs": lists, "finish_reason": reason})
    return {
        "id": envelope.id,
        "object": "text_completion",
        "created": envelope.created,
        "model": envelope.model,
        "choices": choices,
        "usage": to_completion_usage(total_usage(usages)),
        "system_fingerprint": envelope.system_fingerprint,
    }


def _texts(parts: Iterable[AnswerDelta]) -> list[TextDelta]:
    return [part for part in parts if isinstance(part, TextDelta)]  # raw prompts have no tools, so all of them


def _mean_logprob(deltas: Iterable[TextDelta]) -> float:
    """Of an answer's tokens; the measure of `best_of`."""
    logprobs = [token.logprob.logprob for delta in deltas for token in delta.tokens]
    return sum(logprobs) / len(logprobs) if logprobs else float("-inf")


class CompletionStream:
    """Folds events into legacy chunks, as text of server-sent events. One object a stream, used by one loop."""

    def __init__(
        self,
        prompts: PromptChoices,
        envelope: Envelope,
        options: ChunkOptions,
        token_bytes: TokenBytes,
        num_prompt_tokens: Sequence[int],
    ) -> None:
        """num_prompt_tokens: of each prompt."""
        self._prompts = prompts
        self._envelope = envelope
        self._options = options
        self._logprobs = [LogprobsFold(token_bytes) for _ in range(prompts.n * len(prompts.echoes))]
        self._usage = RunningUsage(sum(num_prompt_tokens))
        self._is_plain = not options.logprobs and not options.continuous_usage
        self._text_chunks: list[tuple[str, str]] = []  # of each choice introduced: a text chunk around its text

    def push(self, index: int, event: ChatEvent) -> list[str]:
        """The chunks of one event; an event that shows the client nothing gives none."""
        if self._is_plain and index < len(self._text_chunks) and type(event) is TextDelta and event.text:
            before, after = self._text_chunks[index]
            return [f"{before}{to_json(event.text)}{after}"]
        chunks = self._introduce(index)
        self._usage.push(index, event, index // self._prompts.n)
        match event:
            case TextDelta(text, tokens):
                lists = self._logprobs[index].push([event]) if self._options.logprobs else None
                if text or (tokens and self._options.logprobs):
                    chunks.append(self._chunk(index, text, lists))
            case Finished():
                chunks.append(self._chunk(index, "", finish_reason=_reason(event)))
            case ToolCallDelta():
                pass
        return chunks

    def end(self) -> list[str]:
        """What follows the last event of the last choice."""
        usage = [self._event([], self._usage.final)] if self._options.include_usage else []
        return [*usage, sse.DONE]

    def fail(self, failure: APIError) -> list[str]:
        """What ends a stream that cannot be completed."""
        return [sse.event(error_json(failure))]

    def _introduce(self, index: int) -> list[str]:
        """Choices appear in order: the echo of each, or an empty text for those that a later one overtakes."""
        chunks: list[str] = []
        for number in range(len(self._text_chunks), index + 1):
            echo = self._prompts.echoes[number // self._prompts.n]
            if echo or number < index:
                chunks.append(self._chunk(number, echo))
            self._text_chunks.append(sse.around_empty_text(self._chunk(number, "")))
        return chunks

    def _chunk(
        self, index: int, text: str, logprobs: LegacyLogprobs | None = None, finish_reason: FinishReason | None = None
    ) -> str:
        choice: CompletionChoice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._event([choice], self._usage.so_far if self._options.continuous_usage else None)

    def _event(self, choices: list[CompletionChoice], usage: CompletionUsage | None) -> str:
        chunk: Completion = {
            "id": self._envelope.id,
            "object": "text_completion",
            "created": self._envelope.created,
            "model": self._envelope.model,
            "system_fingerprint": self._envelope.system_fingerprint,
            "choices": choices,
        }
        if self._options.include_usage:
            chunk["usage"] = usage
        return sse.event(to_json(chunk))


def _reason(finished: Finished) -> FinishReason:
    return "length" if finished.reason == "length" else "stop"
