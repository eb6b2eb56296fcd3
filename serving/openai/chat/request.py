"""The request bodies of the API, field by field. Everything behind this file trusts what it let pass.

A field is honoured (convert.py reads it), accepted without effect (ACCEPTED_WITHOUT_EFFECT), refused with a
reason (REFUSED), or unknown and refused. `null` means the same as leaving an optional field out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, Discriminator, Field, StringConstraints, Tag, model_validator
from pydantic_core import PydanticCustomError

from serving.openai.chat.messages import STRICT, ChatMessage, FunctionDefinition, ToolDefinition, text_or_list
from serving.openai.chat.structured_outputs import (
    Choices,
    FunctionChoice,
    GuidedJson,
    Pattern,
    ResponseFormat,
    ToolChoice,
    check_functions,
    check_tool_messages,
    check_tools,
    conflict,
)

ACCEPTED_WITHOUT_EFFECT = {
    "user": "who asks; there are no per-user rules",
    "metadata": "nothing is stored that it could label",
    "store": "nothing is stored",
    "service_tier": "there is one tier; answers say `default`",
    "safety_identifier": "as `user`",
    "prompt_cache_key": "equal prefixes are found without it",
    "prompt_cache_retention": "the cache keeps what fits",
    "prompt_cache_options": "as `prompt_cache_retention`",
    "verbosity": "the model was not trained for it",
    "reasoning_effort": "the model does not reason apart from its answer",
    "web_search_options": "the server never reaches out",
    "moderation": "answers are not moderated",
    "prediction": "speeds up, never changes an answer; not needed here",
    "modalities": "only `text` exists",
}

REFUSED = {
    "audio": "This model has no voice: audio output is not available.",
    "suffix": "This model cannot write what stands before a suffix; 'suffix' is not supported.",
}

ModelName = Annotated[str, StringConstraints(min_length=1)]
Temperature = Annotated[float, Field(ge=0.0, le=2.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
TopK = Annotated[int, Field(ge=-1, le=1_000_000)]  # 0 and -1 mean all
RepetitionPenalty = Annotated[float, Field(gt=0.0, le=10.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
TokenIdText = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
LogitBias = Annotated[dict[TokenIdText, Bias], Field(max_length=1024)]
Count = Annotated[int, Field(ge=1, le=128)]
NumTokens = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Stop = Annotated[
    Annotated[StopText, Tag("<string>")] | Annotated[list[StopText], Field(max_length=16), Tag("<array>")],
    Discriminator(text_or_list, custom_error_type="string_or_array", custom_error_message="string or array"),
]
Metadata = Annotated[dict[str, Annotated[str, StringConstraints(max_length=512)]], Field(max_length=16)]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast"]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def without_nulls(cls: type[BaseModel], data: Any, refused: Mapping[str, str] = REFUSED) -> Any:
    """For a `before` validator: optional fields that are null become absent; refused ones raise, unless null."""
    if not isinstance(data, dict):
        return data
    body = cast(dict[str, Any], data)
    for name, reason in refused.items():
        if body.get(name) is not None:
            raise PydanticCustomError("refused", "{message}", {"message": reason, "param": name})
    optional = {name for name, field in cls.model_fields.items() if not field.is_required()} | refused.keys()
    return {key: value for key, value in body.items() if value is not None or key not in optional}


class StreamOptions(BaseModel):
    """What a stream tells beside the text. `continuous_usage_stats` (vLLM's) puts running counts in every chunk."""

    model_config = STRICT
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # accepted without effect: chunks are never padded

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return without_nulls(cls, data)


class ChatRequest(BaseModel):
    """POST /chat/completions. Defaults are the documented ones of ChatGLM2's own API."""

    model_config = STRICT

    model: ModelName
    messages: Annotated[list[ChatMessage], Field(min_length=1)]

    temperature: Temperature = 0.95
    top_p: Fraction = 0.7
    top_k: TopK = 0
    min_p: Fraction = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = {}
    seed: Seed | None = None
    n: Count = 1
    stop: Stop = []
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    max_length: NumTokens | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    tools: Annotated[list[ToolDefinition], Field(max_length=128)] = []
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    functions: Annotated[list[FunctionDefinition], Field(min_length=1, max_length=128)] = []
    function_call: FunctionChoice | None = None
    response_format: ResponseFormat | None = None
    guided_json: GuidedJson | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None

    user: str | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: ServiceTier | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    web_search_options: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return without_nulls(cls, data)

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        _check_lengths(self)
        _check_stream_options(self)
        check_tools(self.tools, self.tool_choice)
        check_functions(self.functions, self.function_call, self.tools, self.tool_choice)
        check_tool_messages(self.messages)
        _check_form(self)
        if self.top_logprobs is not None and not self.logprobs:
            raise conflict("top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true.")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise conflict(
                    "continue_final_message",
                    "'continue_final_message' and 'add_generation_prompt' cannot both be true.",
                )
            last = self.messages[-1]
            if last.role != "assistant" or last.content is None:
                raise conflict(
                    "continue_final_message",
                    "'continue_final_message' needs a last message of the assistant.",
                )
        elif self.add_generation_prompt is False:
            raise conflict(
                "add_generation_prompt", "'add_generation_prompt' may only be false with 'continue_final_message'."
            )
        return self


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<string>"
    if not isinstance(value, list):
        return None
    items: list[Any] = value
    if items and isinstance(items[0], list):
        return "<id lists>"
    if items and isinstance(items[0], int) and not isinstance(items[0], bool):
        return "<ids>"
    return "<texts>"


Prompts = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[str], Field(min_length=1), Tag("<texts>")]
    | Annotated[list[TokenId], Field(min_length=1), Tag("<ids>")]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Tag("<id lists>")],
    Discriminator(_prompt_kind, custom_error_type="string_or_array", custom_error_message="string or array"),
]


class CompletionRequest(BaseModel):
    """POST /completions. Sampling defaults as in chat; the default length is OpenAI's 16 tokens."""

    model_config = STRICT

    model: ModelName
    prompt: Prompts

    temperature: Temperature = 0.95
    top_p: Fraction = 0.7
    top_k: TopK = 0
    min_p: Fraction = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = {}
    seed: Seed | None = None
    n: Count = 1
    best_of: Count | None = None
    stop: Stop = []
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    max_length: NumTokens | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    user: str | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: ServiceTier | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return without_nulls(cls, data)

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionRequest:
        _check_lengths(self)
        _check_stream_options(self)
        if self.echo and self.logprobs is not None:
            raise conflict("logprobs", "The prompt's log-probabilities are not available: 'echo' excludes 'logprobs'.")
        if self.best_of is not None and self.best_of < self.n:
            raise conflict("best_of", "'best_of' must be at least 'n'.")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise conflict("best_of", "'best_of' greater than 'n' cannot be streamed: the best is known at the end.")
        return self


class TokenizeRequest(BaseModel):
    """POST /tokenize: either a raw `prompt` or `messages`; the ids are exactly what a completion would read."""

    model_config = STRICT
    model: ModelName
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=128)] = []
    continue_final_message: bool = False
    return_token_strs: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return without_nulls(cls, data)

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise conflict("prompt", "Give either 'prompt' or 'messages'.")
        return self


class DetokenizeRequest(BaseModel):
    """POST /detokenize: the text of a run of ids; special tokens have none."""

    model_config = STRICT
    model: ModelName
    tokens: list[TokenId]


GenerationRequest = ChatRequest | CompletionRequest


def requested_length(body: GenerationRequest) -> int | None:
    """The answer length that the client named, under whichever of the three names; None if it named none.

    `max_length` counted prompt and answer together in the 2023 server; its README meant the answer, and so does this.
    """
    named = (body.max_tokens, body.max_completion_tokens, body.max_length)
    return next((value for value in named if value is not None), None)


def _check_form(body: ChatRequest) -> None:
    """One form for an answer, and nothing that a form cannot be kept with."""
    named = (
        ("response_format", body.response_format is not None and body.response_format.type != "text"),
        ("guided_json", body.guided_json is not None),
        ("guided_regex", body.guided_regex is not None),
        ("guided_choice", body.guided_choice is not None),
    )
    wanted = [name for name, is_wanted in named if is_wanted]
    if len(wanted) > 1:
        raise conflict(wanted[1], f"'{wanted[0]}' and '{wanted[1]}' cannot be used together: an answer has one form.")
    if wanted and wanted[0] in ("guided_regex", "guided_choice") and offers_tools(body):
        raise conflict(wanted[0], f"'{wanted[0]}' cannot be used together with tools, unless their choice is 'none'.")
    for field, is_used in (
        ("ignore_eos", body.ignore_eos),
        ("min_tokens", body.min_tokens > 0),
        ("continue_final_message", body.continue_final_message),
    ):
        if is_used and (wanted or offers_tools(body)):
            raise conflict(field, f"'{field}' cannot be used together with '{wanted[0] if wanted else 'tools'}'.")


def offers_tools(body: ChatRequest) -> bool:
    """Whether the model is told of any tool."""
    return bool(body.tools or body.functions) and "none" not in (body.tool_choice, body.function_call)


def _check_lengths(body: GenerationRequest) -> None:
    named = {value for value in (body.max_tokens, body.max_completion_tokens, body.max_length) if value is not None}
    if len(named) > 1:
        raise conflict(
            "max_tokens", "'max_tokens', 'max_completion_tokens' and 'max_length' mean the same; their values differ."
        )
    if named and body.min_tokens > named.pop():
        raise conflict("min_tokens", "'min_tokens' must not be greater than 'max_tokens'.")


def _check_stream_options(body: GenerationRequest) -> None:
    if body.stream_options is None:
        return
    if not body.stream:
        raise conflict("stream_options", "The 'stream_options' parameter is only allowed when 'stream' is enabled.")
    if body.stream_options.continuous_usage_stats and not body.stream_options.include_usage:
        raise conflict(
            "stream_options.continuous_usage_stats", "'continuous_usage_stats' is only allowed with 'include_usage'."
        )
