"""Messages of a chat request, as the client writes them -> the conversation that a chat format renders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

from serving.generation.interface import Message, Role, ToolCall
from serving.generation.tools.custom import to_arguments
from serving.http.errors import invalid
from serving.openai.chat.tools import OneOfBoth
from serving.openai.common import STRING_OR_ARRAY, StrictModel
from serving.openai.validation import rejected

MESSAGE_FIELDS_WITHOUT_EFFECT = {
    "refusal": "an earlier answer's refusal; this model's answers have none",
    "annotations": "an earlier answer's web citations",
    "reasoning_details": "an earlier answer's reasoning in the shape of other servers",
    "thinking_blocks": "as `reasoning_details`",
    "provider_specific_fields": "what a proxy noted of another provider's answer",
    "extra_content": "as `provider_specific_fields`",
    "cache_control": "a hint for another provider's cache; equal prefixes are found without it",
    "copilot_cache_control": "as `cache_control`",
}
MEDIA_PARTS = frozenset(
    (
        *("image", "image_url", "input_image"),
        *("audio", "audio_url", "input_audio"),
        *("video", "video_url", "input_video"),
        *("file", "input_file"),
    )
)
MAX_CALLS = 128  # of one message
PART_SEPARATOR = "\n"  # between the text parts of one message
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def refuse_media(value: Any) -> Any:
    """For a `before` validator of content parts."""
    if not isinstance(value, dict):
        return value
    part = cast("dict[str, Any]", value)
    kind = part.get("type")
    if isinstance(kind, str) and kind in MEDIA_PARTS:
        message = f"Image and audio input are not supported: the content part of type '{kind}' has to be text."
        raise rejected(message, code="unsupported_value")
    return part


def part_kind(value: Any) -> str:
    """Which of the parts a value is; the tags never show in an error's path."""
    return "<refusal>" if isinstance(value, dict) and value.get("type") == "refusal" else "<text>"


class CacheHints(StrictModel):
    """What proxies pass on for other providers' caches: accepted without effect."""

    cache_control: Any = None
    copilot_cache_control: Any = None


class RefusalPart(CacheHints):
    """An earlier answer's refusal, which is a text like any other."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class TextPart(CacheHints):
    """One part of a message's content."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = None  # without effect


_Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(part_kind),
    BeforeValidator(refuse_media),
]
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[_Part], Field(min_length=1, fail_fast=True), Tag("<array>")],
    STRING_OR_ARRAY,
]


class FunctionCall(StrictModel):
    """A call that the model made earlier; `arguments` is JSON text, or what the model took for it."""

    name: str
    arguments: str


class CustomCall(StrictModel):
    """A call of a custom tool that the model made earlier."""

    name: str
    input: str


class MessageToolCall(CacheHints, OneOfBoth):
    """One entry of an assistant message's `tool_calls`."""

    id: str
    function: FunctionCall | None = None
    custom: CustomCall | None = None
    index: int | None = None  # clients that glue stream deltas together send it back
    provider_specific_fields: Any = None  # without effect, as for messages
    extra_content: Any = None

    def to_call(self) -> ToolCall:
        if self.custom is not None:
            return ToolCall(self.id, self.custom.name, to_arguments(self.custom.input))
        assert self.function is not None
        return ToolCall(self.id, self.function.name, self.function.arguments)


def _given(field: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": [field], "properties": {field: schema}}


_HAS_CALLS = [_given("tool_calls", {"type": "array", "minItems": 1}), _given("function_call", {"type": "object"})]
_RULES: list[Any] = [  # `ChatMessage._fields_agree` as JSON Schema
    {"anyOf": [*_HAS_CALLS, _given("content", {"type": ["string", "array"]}), _given("refusal", {"type": "string"})]},
    {"if": {"anyOf": _HAS_CALLS}, "then": _given("role", {"const": "assistant"})},
    {"if": _given("role", {"const": "tool"}), "then": _given("tool_call_id", {"type": "string"})},
    {"if": _given("role", {"const": "function"}), "then": _given("name", {"type": "string"})},
]


class ChatMessage(CacheHints):
    """One turn of the conversation."""

    model_config = ConfigDict(json_schema_extra={"allOf": _RULES})

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_CALLS)] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    reasoning_content: str | None = None
    reasoning: Any = None
    reasoning_details: Any = None
    thinking_blocks: Any = None
    provider_specific_fields: Any = None
    extra_content: Any = None
    audio: None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatMessage:
        calls = bool(self.tool_calls) or self.function_call is not None
        if calls and self.role != "assistant":
            raise rejected(f"Messages with role '{self.role}' must not have tool calls.", "tool_calls")
        if self.content is None and not calls and self.refusal is None:
            raise rejected("Invalid value for 'content': expected a string, got null.", "content")
        if self.role == "tool" and self.tool_call_id is None:
            raise rejected("Messages with role 'tool' must have a 'tool_call_id'.", "tool_call_id")
        if self.role == "function" and self.name is None:
            raise rejected("Messages with role 'function' must have a 'name'.", "name")
        return self

    @property
    def turn(self) -> tuple[str | None, list[str]]:
        """The id of the call whose result this is, and the ids of the calls that it makes."""
        return self.tool_call_id if self.role == "tool" else None, [call.id for call in self.tool_calls or []]

    def to_message(self, index: int) -> Message:
        """The same for chat formats, with the role reduced to the four that they have. index: in `messages`."""
        content = self.content
        text = content if isinstance(content, str) else PART_SEPARATOR.join(part.text for part in content or [])
        calls = [call.to_call() for call in self.tool_calls or []]
        if self.function_call is not None:
            # legacy calls have no id: the function's name ties the call to its result
            calls.append(ToolCall(self.function_call.name, self.function_call.name, self.function_call.arguments))
        if not text and not calls and self.refusal is not None:
            text = self.refusal
        call_id = self.name if self.role == "function" else self.tool_call_id
        given = self.reasoning_content or self.reasoning
        thought = given if isinstance(given, str) and self.role == "assistant" else ""
        return Message(ROLES[self.role], text, self.name, tuple(calls), call_id, thought, f"messages[{index}]")


def unanswered_call(turns: Sequence[tuple[str | None, Sequence[str]]]) -> tuple[int, list[str]] | None:
    """(index, its calls without a result) of the first turn that breaks the rule; None if none does.

    Every result of a tool follows the message that calls it, and every call has its result. Without such calls, the
    turn is a result without its call.
    turns: of each message, the id of the call whose result it is, and the ids of the calls that it makes.
    """
    open_calls: list[str] = []  # in order, for the message
    answered: set[str] = set()
    for index, (call_id, call_ids) in enumerate(turns):
        if call_id is not None:
            if call_id not in open_calls and call_id not in answered:
                return index, []
            answered.add(call_id)
            open_calls = [other for other in open_calls if other != call_id]
            continue
        if open_calls:
            return index - 1, open_calls
        open_calls, answered = list(dict.fromkeys(call_ids)), set()
    return (len(turns) - 1, open_calls) if open_calls else None


def check_calls_are_answered(messages: Sequence[ChatMessage]) -> None:
    """Raises APIError 400 for a result without its call, or the opposite."""
    broken = unanswered_call([message.turn for message in messages])
    if broken is None:
        return
    index, call_ids = broken
    message = (
        "Invalid parameter: messages with role 'tool' must be a response to a preceding message with 'tool_calls' and "
        "its 'tool_call_id'."
    )
    if call_ids:
        message = (
            "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
            "'tool_call_id'. The following tool_call_ids did not have response messages: "
            + ", ".join(call_id[:64] for call_id in call_ids)
        )
    raise invalid(message, f"messages[{index}].role")
