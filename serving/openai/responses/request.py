"""The body of a request for a response, field by field -> the job for the generation pipeline.

The endpoint is stateless: a client that continues a conversation sends it again. Both this endpoint and chat accept and
refuse the same, so they share the checks of tools, formats and tool messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema, model_validator

from serving.generation.interface import Conversation, Message, ToolCall
from serving.generation.pipeline import ChatJob
from serving.generation.structured.grammar import AnswerConstraint, JsonAnswer
from serving.generation.tools.custom import to_arguments
from serving.http.errors import invalid
from serving.openai import common
from serving.openai.chat.messages import (
    MAX_CALLS,
    PART_SEPARATOR,
    ROLES,
    CacheHints,
    RefusalPart,
    part_kind,
    refuse_media,
    unanswered_call,
)
from serving.openai.chat.request import DEFAULT_MAX_TOKENS
from serving.openai.chat.structured_outputs import check_formats
from serving.openai.chat.tools import MAX_TOOLS, FunctionName, check_tools, to_selection
from serving.openai.common import STRING_OR_ARRAY, GenerationRequest, NumTokens, StrictModel
from serving.openai.responses.tools import AnyTool, ToolChoice
from serving.openai.validation import kind_of, rejected

ACCEPTED_WITHOUT_EFFECT = {
    **common.ACCEPTED_WITHOUT_EFFECT,
    "include": "but for `message.output_text.logprobs`: there are no other outputs that could be included",
    "max_tool_calls": "counts built-in tools, of which there are none",
    "metadata": "comes back in the answer",
    "moderation": "answers are not moderated",
    "prompt_cache_options": "the cache keeps what fits",
    "prompt_cache_retention": "the cache keeps what fits",
    "reasoning": "a model that thinks before it answers does so as it was trained",
    "store": "only `false`, which is the default here: nothing is stored",
    "background": "only `false`",
    "stream_options": "only `include_obfuscation`: events are never padded",
    "truncation": "only `disabled`: a conversation is never shortened without notice",
}
REFUSED = {
    "previous_response_id": "Responses are not stored here: send the whole conversation as 'input' instead.",
    "conversation": "Conversations are not stored here: send the whole conversation as 'input' instead.",
    "prompt": "Prompt templates are not stored here: send 'instructions' and 'input' instead.",
    "context_management": "'context_management' is not supported: a conversation is never compacted.",
    "access_programs": "'access_programs' is not supported.",
    "image": "Image output is not supported.",
    "background_options": "'background_options' is not supported: answers are given at once or streamed.",
}
REFUSED_VALUES: dict[tuple[str, object], str] = {
    ("store", True): "Responses are not stored here: leave 'store' out or send false.",
    ("background", True): "Background responses are not supported: answers are given at once or streamed.",
    ("truncation", "auto"): "A conversation is never shortened without notice: 'truncation' can only be 'disabled'.",
}
INPUT_ITEMS = (
    *("message", "function_call", "function_call_output", "reasoning"),
    *("custom_tool_call", "custom_tool_call_output"),
)
LOGPROBS = "message.output_text.logprobs"
Status = Literal["in_progress", "completed", "incomplete"]
# Literal[False] would take 0; true is one of REFUSED_VALUES
OnlyFalse = Annotated[bool, WithJsonSchema({"const": False, "type": "boolean"})]


class InputText(CacheHints):
    """One part of an item's content; `output_text` is an earlier answer's, with all that the SDK leaves in it."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    logprobs: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    parsed: Any = None
    prompt_cache_breakpoint: Any = None  # without effect


InputPart = Annotated[
    Annotated[InputText, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(part_kind),
    BeforeValidator(refuse_media),
]
InputContent = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[InputPart], Field(min_length=1, fail_fast=True), Tag("<array>")],
    STRING_OR_ARRAY,
]


class MessageItem(StrictModel):
    """One turn of the conversation, written by the client or given back from an earlier answer."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: InputContent
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(StrictModel):
    """A call that the model made in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None
    parsed_arguments: Any = None


class CallOutputItem(StrictModel):
    """What the client's function or custom tool returned."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: InputContent
    id: str | None = None
    status: Status | None = None


class CustomCallItem(StrictModel):
    """A call of a custom tool that the model made in an earlier answer."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str
    id: str | None = None
    status: Status | None = None


class ReasoningPart(StrictModel):
    """The text of a thought."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(StrictModel):
    """What the model thought before an earlier answer, for models whose chat template uses it."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningPart], Field(fail_fast=True)] | None = None
    id: str | None = None
    summary: Any = None  # without effect, like the following
    encrypted_content: str | None = None
    status: Status | None = None


def _item_kind(value: Any) -> str:
    kind = kind_of(value)
    return f"<{kind}>" if kind in INPUT_ITEMS else "<message>"


def _known_item(value: Any) -> Any:
    kind = kind_of(value)
    if isinstance(kind, str) and kind not in INPUT_ITEMS:
        known = ", ".join(INPUT_ITEMS)
        message = f"Input items of type '{kind[:60]}' are not supported, only {known}."
        raise rejected(message, "type", "unsupported_value")
    return value


_AnyItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[CallOutputItem, Tag("<function_call_output>")]
    | Annotated[CustomCallItem, Tag("<custom_tool_call>")]
    | Annotated[CallOutputItem, Tag("<custom_tool_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(_item_kind),
    BeforeValidator(_known_item),
]
Input = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[_AnyItem], Field(min_length=1, fail_fast=True), Tag("<array>")],
    STRING_OR_ARRAY,
]


class TextFormat(StrictModel):
    """What the answer's text must look like, in the flat shape of this endpoint."""

    model_config = ConfigDict(serialize_by_alias=True)
    type: Literal["text", "json_object", "json_schema"]
    name: FunctionName | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(StrictModel):
    """`text` of a request."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(StrictModel):
    """`stream_options` of this endpoint; usage always comes with the last event."""

    include_obfuscation: bool | None = None


class ResponsesRequest(GenerationRequest):
    """POST /responses. Extensions of chat that can be said of one answer are fields here, too."""

    refused: ClassVar[Mapping[str, str]] = REFUSED

    input: Input

    instructions: str | None = None
    max_output_tokens: NumTokens | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    text: TextConfig | None = None
    tools: list[AnyTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    include: Annotated[list[str], Field(fail_fast=True)] | None = None
    stream_options: ResponseStreamOptions | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    moderation: dict[str, Any] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    reasoning: dict[str, Any] | None = None
    store: OnlyFalse | None = None
    background: OnlyFalse | None = None
    truncation: Literal["disabled"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_values(cls, data: Any) -> Any:
        if isinstance(data, dict):
            body = cast("dict[str, Any]", data)
            for (name, value), reason in REFUSED_VALUES.items():
                if type(body.get(name)) is type(value) and body[name] == value:
                    raise invalid(reason, name, "unsupported_value")
        return data

    @model_validator(mode="after")
    def _fields_agree(self) -> ResponsesRequest:
        if self.max_output_tokens is not None and self.min_tokens > self.max_output_tokens:
            raise invalid("'min_tokens' must not be greater than 'max_output_tokens'.", "min_tokens")
        if self.tools or self.tool_choice is not None:
            check_tools([tool.name for tool in self.tools], to_selection(self.tool_choice))
        formats = ["text.format"] if self.format is not None and self.format.type != "text" else []
        breaking = {"ignore_eos": self.ignore_eos, "min_tokens": self.min_tokens > 0}
        check_formats(formats, bool(self.tools) and self.tool_choice != "none", breaking)
        return self

    @property
    def format(self) -> TextFormat | None:
        return None if self.text is None else self.text.format

    @property
    def shows_logprobs(self) -> bool:
        """Whether the text's parts carry log-probabilities."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())


def to_chat_job(body: ResponsesRequest) -> ChatJob:
    """Raises APIError 400 for an incomplete format, and for tools' results without their calls or the opposite."""
    selection = to_selection(body.tool_choice)
    return ChatJob(
        conversation=Conversation(_messages(body), selection.offered([tool.tool for tool in body.tools])),
        sampling=body.sampling(
            body.max_output_tokens or DEFAULT_MAX_TOKENS, (body.top_logprobs or 0) if body.shows_logprobs else None
        ),
        stop=body.stop_strings,
        max_tokens_is_default=body.max_output_tokens is None,
        ignore_eos=body.ignore_eos,
        constraint=_constraint(body.format),
        tool_use=selection.tool_use(is_parallel=body.parallel_tool_calls is not False),
    )


def _constraint(text_format: TextFormat | None) -> AnswerConstraint | None:
    if text_format is None:
        return None
    given = text_format.model_dump(exclude={"type"}, exclude_none=True)
    if text_format.type != "json_schema":
        for name in given:
            raise invalid(f"Unknown parameter: 'text.format.{name}'.", f"text.format.{name}", "unknown_parameter")
        return None if text_format.type == "text" else JsonAnswer({"type": "object"}, "text.format")
    for name in ("name", "schema"):
        if name not in given:
            param = f"text.format.{name}"
            raise invalid(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    return JsonAnswer(given["schema"], "text.format", given["name"], bool(text_format.strict))


def _messages(body: ResponsesRequest) -> tuple[Message, ...]:
    messages = [Message("system", body.instructions, source="instructions")] if body.instructions else []
    if isinstance(body.input, str):
        return (*messages, Message("user", body.input, source="input"))
    thought = ""  # of the answer that follows it
    for index, item in enumerate(body.input):
        source = f"input[{index}]"
        match item:
            case MessageItem(role=role, content=content):
                answered = thought if role == "assistant" else ""
                messages.append(Message(ROLES[role], _text(content), reasoning=answered, source=source))
                thought = ""
            case FunctionCallItem() | CustomCallItem():
                # the calls of one answer, and its text, are one message of a chat
                if not messages or messages[-1].role != "assistant":
                    messages.append(Message("assistant", "", reasoning=thought, source=source))
                    thought = ""
                calls = (*messages[-1].tool_calls, _call(item))
                if len(calls) > MAX_CALLS:
                    message = f"Invalid 'input': more than {MAX_CALLS} function calls in a row."
                    raise invalid(message, "input", "array_above_max_length")
                messages[-1] = replace(messages[-1], tool_calls=calls)
            case ReasoningItem(content=parts):
                thought = PART_SEPARATOR.join(part.text for part in parts or [])
            case CallOutputItem():
                messages.append(Message("tool", _text(item.output), tool_call_id=item.call_id, source=source))
    broken = unanswered_call([(m.tool_call_id, [call.id for call in m.tool_calls]) for m in messages])
    if broken is not None:
        index, call_ids = broken
        message = f"No tool output found for function call {', '.join(call_id[:64] for call_id in call_ids)}."
        if not call_ids:
            call_id = messages[index].tool_call_id or ""
            message = f"No tool call found for function call output with call_id {call_id[:64]}."
        raise invalid(message, messages[index].source)
    return tuple(messages)


def _call(item: FunctionCallItem | CustomCallItem) -> ToolCall:
    if isinstance(item, CustomCallItem):
        return ToolCall(item.call_id, item.name, to_arguments(item.input))
    return ToolCall(item.call_id, item.name, item.arguments)


def _text(content: str | list[InputText | RefusalPart]) -> str:
    return content if isinstance(content, str) else PART_SEPARATOR.join(part.text for part in content)
