"""The messages and tools of a chat request, as the client writes them. Knows nothing of sampling."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)

MESSAGE_FIELDS_WITHOUT_EFFECT = {
    "refusal": "an earlier answer's refusal; this model's answers have none",
    "annotations": "an earlier answer's web citations",
    "reasoning_content": "an earlier answer's reasoning, as some clients send it back",
}

MEDIA_PARTS = frozenset(
    (
        *("image", "image_url", "input_image"),
        *("audio", "audio_url", "input_audio"),
        *("video", "video_url", "input_video"),
        *("file", "input_file"),
    )
)


def text_or_list(value: Any) -> str | None:
    """Which branch of a `string | array` field a value takes; the tags never show in an error's path."""
    if isinstance(value, str):
        return "<string>"
    return "<array>" if isinstance(value, list) else None


def _refuse_media(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    part = cast(dict[str, Any], value)
    kind = part.get("type")
    if isinstance(kind, str) and kind in MEDIA_PARTS:
        message = f"This model has no eyes or ears: content parts of type '{kind}' are not supported, only 'text'."
        raise PydanticCustomError("media", "{message}", {"message": message})
    if kind == "refusal" and part.keys() == {"type", "refusal"}:
        return {"type": "text", "text": part["refusal"]}
    return part


class TextPart(BaseModel):
    """One part of a message's content."""

    model_config = STRICT
    type: Literal["text"]
    text: str


ContentPart = Annotated[TextPart, BeforeValidator(_refuse_media)]
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[ContentPart], Field(min_length=1), Tag("<array>")],
    Discriminator(text_or_list, custom_error_type="string_or_array", custom_error_message="string or array"),
]


class FunctionCall(BaseModel):
    """A call that the model made earlier; `arguments` is JSON text, or what the model took for it."""

    model_config = STRICT
    name: str
    arguments: str


class MessageToolCall(BaseModel):
    """One entry of an assistant message's `tool_calls`."""

    model_config = STRICT
    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None  # clients that glue stream deltas together send it back


class ChatMessage(BaseModel):
    """One turn of the conversation."""

    model_config = STRICT

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=128)] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    audio: None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatMessage:
        calls = bool(self.tool_calls) or self.function_call is not None
        if calls and self.role != "assistant":
            raise _message_error(f"Messages with role '{self.role}' must not have tool calls.", "tool_calls")
        if self.content is None and not calls and self.refusal is None:
            raise _message_error("Invalid value for 'content': expected a string, got null.", "content")
        if self.role == "tool" and self.tool_call_id is None:
            raise _message_error("Messages with role 'tool' must have a 'tool_call_id'.", "tool_call_id")
        if self.role == "function" and self.name is None:
            raise _message_error("Messages with role 'function' must have a 'name'.", "name")
        return self


def _message_error(message: str, field: str) -> PydanticCustomError:
    return PydanticCustomError("message", "{message}", {"message": message, "param": field})


class FunctionDefinition(BaseModel):
    """What the model is told about a function. `strict`: its arguments always fit `parameters`."""

    model_config = STRICT
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(BaseModel):
    """One entry of `tools`."""

    model_config = STRICT
    type: Literal["function"]
    function: FunctionDefinition
