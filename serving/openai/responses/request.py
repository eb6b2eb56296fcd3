"""POST /responses: the request, field by field. Knows no answer.

The endpoint is stateless: whoever wants the conversation to go on sends it again. What a chat request can say as well
is checked by the chat request itself, so both endpoints honour and refuse the same.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from serving.openai.chat.messages import MEDIA_PARTS, STRICT, text_or_list
from serving.openai.chat.request import (
    Fraction,
    LogitBias,
    Metadata,
    ModelName,
    NumTokens,
    Penalty,
    RepetitionPenalty,
    Seed,
    ServiceTier,
    Stop,
    Temperature,
    TopK,
    without_nulls,
)

ACCEPTED_WITHOUT_EFFECT = {
    "include": "but for `message.output_text.logprobs`: there are no other outputs that could be included",
    "max_tool_calls": "counts built-in tools, of which there are none",
    "metadata": "comes back in the answer",
    "moderation": "answers are not moderated",
    "prompt_cache_key": "equal prefixes are found without it",
    "prompt_cache_options": "the cache keeps what fits",
    "prompt_cache_retention": "the cache keeps what fits",
    "reasoning": "the model does not reason apart from its answer",
    "safety_identifier": "as `user`",
    "service_tier": "there is one tier; answers say `default`",
    "store": "only `false`, which is the default here: nothing is stored",
    "background": "only `false`",
    "stream_options": "only `include_obfuscation`: events are never padded",
    "truncation": "only `disabled`: a conversation is never shortened in silence",
    "user": "who asks; there are no per-user rules",
}

REFUSED = {
    "previous_response_id": "Responses are not stored here: send the whole conversation as 'input' instead.",
    "conversation": "Conversations are not stored here: send the whole conversation as 'input' instead.",
    "prompt": "Prompt templates are not stored here: send 'instructions' and 'input' instead.",
    "context_management": "A conversation is never compacted in silence: 'context_management' is not supported.",
    "access_programs": "There are no access programs here: 'access_programs' is not supported.",
    "image": "This model has no eyes: 'image' is not supported.",
    "background_options": "'background_options' is not supported: answers are given at once or streamed.",
}

REFUSED_VALUES: dict[tuple[str, object], str] = {
    ("store", True): "Responses are not stored here: leave 'store' out or send false.",
    ("background", True): "Background responses are not supported: answers are given at once or streamed.",
    ("truncation", "auto"): "A conversation is never shortened in silence: 'truncation' can only be 'disabled'.",
}

INPUT_ITEMS = ("message", "function_call", "function_call_output")
LOGPROBS = "message.output_text.logprobs"
Status = Literal["in_progress", "completed", "incomplete"]


def _refused(message: str, param: str = "") -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


def _known_part(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    part = cast(dict[str, Any], value)
    kind = part.get("type")
    if isinstance(kind, str) and kind in MEDIA_PARTS:
        message = f"This model has no eyes or ears: content parts of type '{kind}' are not supported, only text."
        raise PydanticCustomError("media", "{message}", {"message": message})
    if kind == "refusal" and part.keys() == {"type", "refusal"}:
        return {"type": "output_text", "text": part["refusal"]}
    return part


class InputText(BaseModel):
    """One part of an item's content; `output_text` is an earlier answer's, with all that the SDK leaves in it."""

    model_config = STRICT
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[dict[str, Any]] | None = None
    logprobs: list[dict[str, Any]] | None = None
    parsed: Any = None


InputContent = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[Annotated[InputText, BeforeValidator(_known_part)]], Field(min_length=1), Tag("<array>")],
    Discriminator(text_or_list, custom_error_type="string_or_array", custom_error_message="string or array"),
]


class MessageItem(BaseModel):
    """One turn of the conversation, written by the client or given back from an earlier answer."""

    model_config = STRICT
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: InputContent
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(BaseModel):
    """A call that the model made in an earlier answer."""

    model_config = STRICT
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None
    parsed_arguments: Any = None


class FunctionOutputItem(BaseModel):
    """What the client's function returned."""

    model_config = STRICT
    type: Literal["function_call_output"]
    call_id: str
    output: InputContent
    id: str | None = None
    status: Status | None = None


def _item_kind(value: Any) -> str:
    kind = cast(dict[str, Any], value).get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in INPUT_ITEMS else "<message>"


def _known_item(value: Any) -> Any:
    kind = cast(dict[str, Any], value).get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in INPUT_ITEMS:
        known = ", ".join(INPUT_ITEMS)
        raise _refused(f"Input items of type '{kind[:60]}' are not supported, only {known}.", "type")
    return value


InputItem = MessageItem | FunctionCallItem | FunctionOutputItem
_AnyItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionOutputItem, Tag("<function_call_output>")],
    Discriminator(_item_kind),
    BeforeValidator(_known_item),
]
Input = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[_AnyItem], Field(min_length=1), Tag("<array>")],
    Discriminator(text_or_list, custom_error_type="string_or_array", custom_error_message="string or array"),
]


def _only_functions(value: Any) -> Any:
    kind = cast(dict[str, Any], value).get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise _refused(f"Tools of type '{kind[:60]}' do not exist here, only 'function'.", "type")
    return value


class FunctionTool(BaseModel):
    """A function that the model may call, in the flat shape of this endpoint."""

    model_config = STRICT
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(BaseModel):
    """What the answer's text must look like, in the flat shape of this endpoint."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, serialize_by_alias=True)
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(BaseModel):
    """`text` of a request."""

    model_config = STRICT
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(BaseModel):
    """`stream_options` of this endpoint; usage always comes with the last event."""

    model_config = STRICT
    include_obfuscation: bool | None = None


class ResponsesRequest(BaseModel):
    """POST /responses. Sampling defaults as in chat; what chat's own extensions can say, this can say too."""

    model_config = STRICT

    model: ModelName
    input: Input

    instructions: str | None = None
    temperature: Temperature = 0.95
    top_p: Fraction = 0.7
    max_output_tokens: NumTokens | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool = False
    text: TextConfig | None = None
    tools: list[Annotated[FunctionTool, BeforeValidator(_only_functions)]] = []
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    top_k: TopK = 0
    min_p: Fraction = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = {}
    seed: Seed | None = None
    stop: Stop = []
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False

    include: list[str] | None = None
    stream_options: ResponseStreamOptions | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    metadata: Metadata | None = None
    moderation: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    reasoning: dict[str, Any] | None = None
    safety_identifier: str | None = None
    service_tier: ServiceTier | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if isinstance(data, dict):
            body = cast(dict[str, Any], data)
            for (name, value), reason in REFUSED_VALUES.items():
                if type(body.get(name)) is type(value) and body[name] == value:
                    raise _refused(reason, name)
        return without_nulls(cls, data, REFUSED)

    @property
    def shows_logprobs(self) -> bool:
        """Whether the text's parts carry log-probabilities."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())
