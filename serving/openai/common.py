"""What the endpoints share: request fields, the way from a body to a prompt, and what chunks repeat."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from serving.engine.interface import SamplingParams
from serving.generation.interface import AnswerDelta, Conversation, Finished, IndexedEvent, PromptError
from serving.generation.pipeline import ChatJob, CompletionJob, ContextOverflow, Prompt, RunningModel
from serving.http.errors import ErrorResponse, invalid
from serving.http.json_body import INLINE_BYTES, parse_object, read_body
from serving.http.request_context import note_ignored, request_context
from serving.http.server_sent_events import to_json, to_json_slices
from serving.openai import errors
from serving.openai.limits import ApiLimits
from serving.openai.start_generation import GenerationStarter
from serving.openai.validation import remove_unknown, to_api_error
from serving.registry import ModelRegistry

INLINE_ITEMS = 256  # events of an answer, tokens, numbers; a response with more is built in a thread
INLINE_PROMPT_CHARACTERS = 4096  # longer prompts are tokenized in a thread
CHARACTERS_PER_MESSAGE = 64  # a message takes the time of so many characters, even an empty one

TokenBytes = Callable[[int], bytes]

REFUSED = {
    "audio": "Audio output is not supported.",
    "suffix": "'suffix' is not supported: the model cannot insert text before a suffix.",
}
ACCEPTED_WITHOUT_EFFECT = {
    "user": "an end user's identifier; no rule depends on it",
    "metadata": "nothing is stored that it could label",
    "store": "nothing is stored",
    "service_tier": "there is one tier; answers say `default`",
    "safety_identifier": "as `user`",
    "prompt_cache_key": "equal prefixes are found without it",
}


def text_or_list(value: Any) -> str | None:
    """Which branch of a `string | array` field a value takes; the tags never show in an error's path."""
    if isinstance(value, str):
        return "<string>"
    return "<array>" if isinstance(value, list) else None


STRING_OR_ARRAY = Discriminator(
    text_or_list, custom_error_type="string_or_array", custom_error_message="string or array"
)
ModelName = Annotated[str, StringConstraints(min_length=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
TokenIdText = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
LogitBias = Annotated[
    dict[TokenIdText, Annotated[float, Field(ge=-100.0, le=100.0)]],
    Field(max_length=1024, json_schema_extra={"additionalProperties": False}),
]
NumTokens = Annotated[int, Field(ge=1)]
StopText = Annotated[str, StringConstraints(max_length=1024)]
Stop = Annotated[
    Annotated[StopText, Tag("<string>")] | Annotated[list[StopText], Field(max_length=16), Tag("<array>")],
    STRING_OR_ARRAY,
]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=0)]  # in answers


class StrictModel(BaseModel):
    """A JSON object of known fields, which are not converted: 1 is not "1" or true."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RequestBody(StrictModel):
    """A body, where `null` means the same as leaving an optional field out.

    So does "" for a refused field: some clients always send an empty `suffix`.
    """

    refused: ClassVar[Mapping[str, str]] = REFUSED  # field: why it is not supported

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        body = cast("dict[str, Any]", data)
        for name, reason in cls.refused.items():
            if body.get(name) not in (None, ""):
                raise invalid(reason, name, "unsupported_value")
        return {
            name: value
            for name, value in body.items()
            if not (value is None and cls._is_optional(name)) and not (value == "" and name in cls.refused)
        }

    @classmethod
    def _is_optional(cls, name: str) -> bool:
        field = cls.model_fields.get(name)
        return name in cls.refused if field is None else not field.is_required()


class GenerationRequest(RequestBody):
    """The fields of every endpoint that generates. Defaults are the documented ones of ChatGLM2's own API."""

    model: ModelName
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.95
    top_p: Fraction = 0.7
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] = 0  # 0 and -1 mean all
    min_p: Fraction = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = {}
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop = []
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    stream: bool = False

    user: str | None = None
    metadata: Annotated[dict[str, MetadataValue], Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Without empty ones, which some editors send and which can stop nothing."""
        given = (self.stop,) if isinstance(self.stop, str) else self.stop
        return tuple(text for text in given if text)

    def sampling(self, max_tokens: int, num_top_logprobs: int | None) -> SamplingParams:
        """num_top_logprobs: None for no log-probabilities at all."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=float(self.temperature),
            top_p=float(self.top_p),
            top_k=max(self.top_k, 0),
            min_p=float(self.min_p),
            repetition_penalty=float(self.repetition_penalty),
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            logit_bias=tuple((int(token_id), float(bias)) for token_id, bias in self.logit_bias.items()),
            # generators want seeds that are not negative; below 2**62, choice i can add i to it
            seed=None if self.seed is None else self.seed % 2**62,
            min_tokens=self.min_tokens,
            num_top_logprobs=num_top_logprobs,
        )


class StreamOptions(RequestBody):
    """What a stream contains beside the text. `continuous_usage_stats` (vLLM's) puts token counts into every chunk."""

    refused: ClassVar[Mapping[str, str]] = {}
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # accepted without effect: chunks are never padded


class ChoicesRequest(GenerationRequest):
    """The fields of /chat/completions and /completions: n answers, and the three names of their length."""

    n: Annotated[int, Field(ge=1, le=128)] = 1
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    max_length: NumTokens | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None

    @property
    def requested_length(self) -> int | None:
        """The answer length that the client named; None if it named none.

        `max_length` counted prompt and answer together in the 2023 server; its README meant the answer, and so does
        this.
        """
        named = (self.max_tokens, self.max_completion_tokens, self.max_length)
        return next((value for value in named if value is not None), None)

    @model_validator(mode="after")
    def _lengths_and_options_agree(self) -> Self:
        named = {self.max_tokens, self.max_completion_tokens, self.max_length} - {None}
        if len(named) > 1:
            message = "'max_tokens', 'max_completion_tokens' and 'max_length' mean the same; their values differ."
            raise invalid(message, "max_tokens")
        if self.requested_length is not None and self.min_tokens > self.requested_length:
            raise invalid("'min_tokens' must not be greater than 'max_tokens'.", "min_tokens")
        if self.stream_options is None:
            return self
        if not self.stream:
            message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise invalid(message, "stream_options")
        if self.stream_options.continuous_usage_stats and not self.stream_options.include_usage:
            message = "'continuous_usage_stats' is only allowed with 'include_usage'."
            raise invalid(message, "stream_options.continuous_usage_stats")
        return self


def by_choice(events: Iterable[IndexedEvent]) -> list[tuple[int, list[AnswerDelta], Finished]]:
    """(index, parts of the answer, its end) of every choice of a finished generation."""
    parts: dict[int, list[AnswerDelta]] = {}
    ends: dict[int, Finished] = {}
    for index, event in events:
        if isinstance(event, Finished):
            ends[index] = event
        else:
            parts.setdefault(index, []).append(event)
    return [(index, parts.get(index, []), end) for index, end in sorted(ends.items())]


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
    has_legacy_functions: bool = False  # calls are `function_call`, as before there were tools
    has_named_tool: bool = False  # the client chose the function: then an answer ends with `stop`


def chunk_options(
    body: ChoicesRequest, logprobs: bool, has_legacy_functions: bool = False, has_named_tool: bool = False
) -> ChunkOptions:
    stream = body.stream_options or StreamOptions()
    usage = stream.include_usage, stream.continuous_usage_stats
    return ChunkOptions(logprobs, *usage, has_legacy_functions, has_named_tool)


MAX_IGNORED = 64  # unknown fields of one body
BodyT = TypeVar("BodyT", bound=RequestBody)
JobT = TypeVar("JobT")


@dataclass(frozen=True)
class Api:
    """What every endpoint of one application works with."""

    registry: ModelRegistry
    limits: ApiLimits
    generations: GenerationStarter

    async def parse(self, request: Request, kind: type[BodyT]) -> BodyT:
        """The body as a typed request. Raises APIError 400, 408, 413 or 415."""
        return (await self.parse_job(request, kind, _no_job))[0]

    async def parse_job(
        self, request: Request, kind: type[BodyT], to_job: Callable[[BodyT], JobT]
    ) -> tuple[BodyT, JobT]:
        """The body as a typed request, and the job that it asks for. Raises APIError 400, 408, 413 or 415."""
        raw = await read_body(request, self.limits.body)
        parse = partial(_parse, raw, kind, to_job, self.limits.ignores_unknown)
        body, job, ignored = await asyncio.to_thread(parse) if len(raw) > INLINE_BYTES else parse()
        if ignored:
            note_ignored(request_context(request.scope), ignored)
        return body, job

    def envelope(self, prefix: str, name: str) -> Envelope:
        served = self.registry.find(name) or self.registry.default
        return Envelope(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), name, served.fingerprint)


def _parse(
    raw: bytes, kind: type[BodyT], to_job: Callable[[BodyT], JobT], ignores_unknown: bool
) -> tuple[BodyT, JobT, list[str]]:
    """The body, its job, and the paths of the fields that were ignored."""
    fields = parse_object(raw)
    ignored: list[str] = []
    while True:
        try:
            body = kind.model_validate(fields)
        except ValidationError as error:
            # a list's validation stops at its first error, so there may be more behind each
            removed = remove_unknown(fields, error) if ignores_unknown and len(ignored) < MAX_IGNORED else []
            if not removed:
                raise to_api_error(error) from None
            ignored += removed
        else:
            return body, to_job(body), ignored


def _no_job(body: RequestBody) -> None:
    """For requests that generate nothing."""


@dataclass(frozen=True)
class Operation:
    """One route: what answers it, with its summary as docstring, and its types for the published document."""

    method: Literal["get", "post"]
    path: str
    name: str
    handler: Callable[[Api, Request], Coroutine[Any, Any, Response]]
    answer: type[Any]
    request: type[RequestBody] | None = None
    event: Any = None  # of a stream; a type
    failure: type[Any] = ErrorResponse


async def build_prompt(
    model: RunningModel, job: ChatJob | CompletionJob, conversation_param: str = "messages"
) -> Prompt:
    """Tokenize and compile, in a thread when that takes long. Raises APIError 400 for a job that is refused.

    conversation_param: the request's field that holds the conversation.
    """
    try:
        if _num_characters(job) > INLINE_PROMPT_CHARACTERS or (isinstance(job, ChatJob) and job.needs_grammar):
            return await asyncio.to_thread(model.build_prompt, job)
        return model.build_prompt(job)
    except ContextOverflow as error:
        raise errors.context_overflow(error, job.max_tokens_is_default, _param(error, conversation_param)) from None
    except PromptError as error:
        raise invalid(error.message, _param(error, conversation_param)) from None


def _num_characters(job: ChatJob | CompletionJob) -> int:
    if isinstance(job, CompletionJob):
        return len(job.prompt)
    messages = job.conversation.messages
    contents = sum(len(message.content) for message in messages)
    arguments = sum(len(call.arguments) for message in messages for call in message.tool_calls)
    return contents + arguments + len(messages) * CHARACTERS_PER_MESSAGE


def _param(error: PromptError, conversation_param: str) -> str:
    return conversation_param if error.param == "messages" else error.param


class InputTokens(TypedDict):
    """How many tokens a prompt has."""

    object: Literal["response.input_tokens"]
    input_tokens: Count


async def count_tokens(
    api: Api, request: Request, model_name: str, conversation: Conversation, conversation_param: str
) -> Response:
    """The answer to a request to count a conversation's tokens. Raises APIError 400, 404, 429 or 503."""
    num_tokens = await num_input_tokens(api, request, model_name, conversation, conversation_param)
    counted: InputTokens = {"object": "response.input_tokens", "input_tokens": num_tokens}
    return json_response(counted)


async def num_input_tokens(
    api: Api, request: Request, model_name: str, conversation: Conversation, conversation_param: str
) -> int:
    """The number itself. Raises the same."""
    model = await api.generations.chat_model(request, model_name)
    try:
        with api.generations.admit(request, model, 0):
            return len(await asyncio.to_thread(model.render, conversation))
    except PromptError as error:
        raise invalid(error.message, _param(error, conversation_param)) from None


def json_response(value: Mapping[str, Any]) -> Response:
    return Response(to_json(value), media_type="application/json")


async def large_json_response(build: Callable[[], Mapping[str, Any]], num_items: int | None = None) -> Response:
    """The response with what `build` returns. Many items are built and encoded in a thread, which lets the event loop
    go on: 8 answers of 2,048 tokens with 20 log-probabilities each take 2.5 s of CPU. num_items: None if unknown."""
    if num_items is not None and num_items <= INLINE_ITEMS:
        return json_response(build())
    text = await asyncio.to_thread(lambda: "".join(to_json_slices(build())).encode())
    return Response(text, media_type="application/json")
