"""The bodies of the API's answers, field by field, for the served document. Answers are made elsewhere, by hand.

Nothing at run time goes through these types: `tests/contract/test_openapi.py` holds real answers against them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

EXACT = ConfigDict(extra="forbid", frozen=True)

Count = Annotated[int, Field(ge=0)]
Bytes = list[Annotated[int, Field(ge=0, le=255)]]
FinishReason = Literal["stop", "length", "tool_calls", "function_call"]
Zero = Literal[0]


class Error(BaseModel):
    """What went wrong. `param` names the field of the request that is at fault."""

    model_config = EXACT
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The one shape of every failure."""

    model_config = EXACT
    error: Error


class PromptTokensDetails(BaseModel):
    """`cached_tokens`: how many of the prompt did not have to be computed again."""

    model_config = EXACT
    cached_tokens: Count
    audio_tokens: Zero


class CompletionTokensDetails(BaseModel):
    """All 0: this server has no such tokens."""

    model_config = EXACT
    reasoning_tokens: Zero
    audio_tokens: Zero
    accepted_prediction_tokens: Zero
    rejected_prediction_tokens: Zero


class CompletionUsage(BaseModel):
    """Token counts of one request; the end token counts as generated."""

    model_config = EXACT
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(BaseModel):
    """A token that could have stood here."""

    model_config = EXACT
    token: str
    logprob: Annotated[float, Field(le=0)]
    bytes: Bytes


class TokenLogprobEntry(BaseModel):
    """The token that stands here, and the likeliest ones."""

    model_config = EXACT
    token: str
    logprob: Annotated[float, Field(le=0)]
    bytes: Bytes
    top_logprobs: Annotated[list[TopLogprob], Field(max_length=20)]


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    model_config = EXACT
    content: list[TokenLogprobEntry]
    refusal: None


class CalledFunction(BaseModel):
    """`arguments` is JSON text."""

    model_config = EXACT
    name: str
    arguments: str


class AnswerToolCall(BaseModel):
    """A call that the model wants made."""

    model_config = EXACT
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """The answer of one choice."""

    model_config = EXACT
    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: Annotated[list[Any], Field(max_length=0)]
    tool_calls: Annotated[list[AnswerToolCall], Field(min_length=1, default_factory=list)]
    function_call: CalledFunction | None = None


class ChatChoice(BaseModel):
    """One of n answers."""

    model_config = EXACT
    index: Count
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The whole answer to a chat request."""

    model_config = EXACT
    id: str
    object: Literal["chat.completion"]
    created: Count
    model: str
    choices: Annotated[list[ChatChoice], Field(min_length=1)]
    usage: CompletionUsage
    service_tier: Literal["default"]
    system_fingerprint: str


class FunctionDelta(BaseModel):
    """The name once, then pieces of the arguments."""

    model_config = EXACT
    name: str | None = None
    arguments: str


class ToolCallDeltaEntry(BaseModel):
    """More of one call; id, type and name come once."""

    model_config = EXACT
    index: Count
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """More of one answer."""

    model_config = EXACT
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: Annotated[list[ToolCallDeltaEntry], Field(min_length=1, default_factory=list)]
    function_call: FunctionDelta | None = None


class ChunkChoice(BaseModel):
    """What happened to one of n answers."""

    model_config = EXACT
    index: Count
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(BaseModel):
    """One event of a chat stream. `usage` is there when `stream_options.include_usage` asks for it."""

    model_config = EXACT
    id: str
    object: Literal["chat.completion.chunk"]
    created: Count
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | None = None


class LegacyLogprobs(BaseModel):
    """Four parallel lists, one entry a token."""

    model_config = EXACT
    tokens: list[str]
    token_logprobs: list[Annotated[float, Field(le=0)]]
    top_logprobs: list[dict[str, Annotated[float, Field(le=0)]]]
    text_offset: list[Count]


class CompletionChoice(BaseModel):
    """One continuation of one prompt."""

    model_config = EXACT
    text: str
    index: Count
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """The answer to a raw prompt, whole or, in a stream, one event of it."""

    model_config = EXACT
    id: str
    object: Literal["text_completion"]
    created: Count
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None
    system_fingerprint: str


class Embedding(BaseModel):
    """One input's vector: numbers, or little-endian float32 in base64."""

    model_config = EXACT
    object: Literal["embedding"]
    index: Count
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all inputs together."""

    model_config = EXACT
    prompt_tokens: Count
    total_tokens: Count


class EmbeddingList(BaseModel):
    """The vectors, in the order of the inputs."""

    model_config = EXACT
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(BaseModel):
    """One name that the served model answers to."""

    model_config = EXACT
    id: str
    object: Literal["model"]
    created: Count
    owned_by: str


class ModelList(BaseModel):
    """All its names, the true one first."""

    model_config = EXACT
    object: Literal["list"]
    data: Annotated[list[Model], Field(min_length=1)]


class InputTokens(BaseModel):
    """How many tokens a prompt has."""

    model_config = EXACT
    object: Literal["response.input_tokens"]
    input_tokens: Count


class Tokens(BaseModel):
    """What a completion would read. `token_strs` on request only."""

    model_config = EXACT
    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: list[str] | None


class DetokenizedText(BaseModel):
    """The text of a run of ids."""

    model_config = EXACT
    prompt: str
