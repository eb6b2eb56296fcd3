"""The body of a request to Anthropic's Messages API, field by field -> the job for the generation pipeline.

Blocks of a message become what chat formats know: text, reasoning, tool calls and tool results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from serving.generation.interface import Conversation, Message, Tool, ToolCall
from serving.generation.pipeline import ChatJob
from serving.generation.structured.grammar import JsonAnswer
from serving.http.errors import invalid
from serving.openai.chat.messages import MAX_CALLS, PART_SEPARATOR, CacheHints, refuse_media, unanswered_call
from serving.openai.chat.structured_outputs import check_formats
from serving.openai.chat.tools import MAX_TOOLS, FunctionName, Mode, ToolSelection, check_tools
from serving.openai.common import STRING_OR_ARRAY, GenerationRequest, NumTokens, StopText, StrictModel
from serving.openai.validation import kind_of, rejected

BLOCKS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")
FORMAT = "output_config.format"
PREFILLED = "messages"  # the field that is at fault where a last message of the assistant breaks a format
REFUSED = {
    "container": "Containers do not exist here: tools run on the client's side.",
    "mcp_servers": "The server calls no MCP servers: offer their tools as 'tools'.",
    "context_management": "'context_management' is not supported: a conversation is never edited.",
}
ACCEPTED_WITHOUT_EFFECT = {
    "metadata": "`user_id` is an end user's identifier; no rule depends on it",
    "service_tier": "there is one tier",
    "cache_control": "a hint for another provider's cache; equal prefixes are found without it",
    "inference_geo": "the server is where it is",
    "speed": "there is one speed",
    "diagnostics": "answers carry none",
}


class TextBlock(CacheHints):
    """Text of a message, of the system prompt or of a tool's result."""

    type: Literal["text"]
    text: str
    citations: Any = None  # without effect


class ToolUseBlock(CacheHints):
    """A call that the model made earlier."""

    type: Literal["tool_use"]
    id: Annotated[str, StringConstraints(min_length=1)]
    name: FunctionName
    input: dict[str, Any]
    caller: Any = None  # without effect


class ToolResultBlock(CacheHints):
    """What the client's tool returned. `is_error` stands in front of the text, which is all that a prompt has."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: TextContent | None = None
    is_error: bool = False
    toolset_name: Any = None  # without effect

    @property
    def text(self) -> str:
        text = _text(self.content or "")
        return f"Error: {text}" if self.is_error else text


class ThinkingBlock(CacheHints):
    """An earlier answer's reasoning, for models whose chat template uses it."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(CacheHints):
    """The same, encrypted by another provider: without effect."""

    type: Literal["redacted_thinking"]
    data: str


def _known_block(value: Any) -> Any:
    refuse_media(value)
    kind = kind_of(value)
    if isinstance(kind, str) and kind not in BLOCKS:
        message = f"Content blocks of type '{kind[:60]}' are not supported, only {', '.join(BLOCKS)}."
        raise rejected(message, "type", "unsupported_value")
    return value


def _block_kind(value: Any) -> str:
    kind = kind_of(value)
    return f"<{kind}>" if kind in BLOCKS else "<text>"


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")],
    Discriminator(_block_kind),
    BeforeValidator(_known_block),
]
Text = Annotated[TextBlock, BeforeValidator(refuse_media)]
TextContent = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Text], Field(fail_fast=True), Tag("<array>")], STRING_OR_ARRAY
]
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Block], Field(min_length=1, fail_fast=True), Tag("<array>")],
    STRING_OR_ARRAY,
]


class InputMessage(StrictModel):
    """One turn. Turns of the same role that follow each other are one turn."""

    role: Literal["user", "assistant", "system"]
    content: Content

    @model_validator(mode="after")
    def _blocks_fit_the_role(self) -> Self:
        for index, block in enumerate(() if isinstance(self.content, str) else self.content):
            role = {"tool_use": "assistant", "tool_result": "user"}.get(block.type, self.role)
            if role != self.role:
                message = f"Blocks of type '{block.type}' belong into messages with the role '{role}'."
                raise rejected(message, f"content[{index}].type")
        return self


class ToolDefinition(CacheHints):
    """A tool that the client runs."""

    name: FunctionName
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None
    input_examples: list[dict[str, Any]] | None = None  # without effect, like the following
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None


def _only_custom(value: Any) -> Any:
    kind = kind_of(value)
    if isinstance(kind, str) and kind != "custom":
        message = f"Tools of type '{kind[:60]}' do not exist here, only 'custom'."
        raise rejected(message, "type", "unsupported_value")
    return value


class ToolChoice(StrictModel):
    """Whether a tool has to be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _a_tool_has_a_name(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise rejected("'name' goes with the type 'tool', and only with it.", "name")
        return self

    @property
    def selection(self) -> ToolSelection:
        modes: dict[str, Mode] = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}
        return ToolSelection(modes[self.type], self.name)


class Thinking(StrictModel):
    """Whether a model that can reason before it answers does; other models have no such switch."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None  # without effect
    display: str | None = None  # without effect


class OutputFormat(StrictModel):
    """A JSON schema for the text."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(StrictModel):
    """`effort` is without effect."""

    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class EndUser(StrictModel):
    """`metadata`: without effect."""

    user_id: str | None = None


class CountMessagesTokensRequest(GenerationRequest):
    """POST /messages/count_tokens. Extensions of chat that can be said of one answer are fields here, too."""

    refused: ClassVar[Mapping[str, str]] = REFUSED

    messages: Annotated[list[InputMessage], Field(min_length=1, fail_fast=True)]
    system: TextContent | None = None
    tools: list[Annotated[ToolDefinition, BeforeValidator(_only_custom)]] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    stop_sequences: list[StopText] = Field([], max_length=16)
    output_config: OutputConfig | None = None
    thinking: Thinking | None = None

    metadata: EndUser | None = None  # type: ignore[assignment]
    service_tier: Literal["auto", "standard_only"] | None = None  # type: ignore[assignment]
    cache_control: Any = None
    inference_geo: str | None = None
    speed: Literal["standard", "fast"] | None = None
    diagnostics: Any = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        selection = self.selection
        if self.tools or self.tool_choice is not None:
            check_tools([tool.name for tool in self.tools], selection)
        breaking = {
            "ignore_eos": self.ignore_eos,
            "min_tokens": self.min_tokens > 0,
            PREFILLED: self.is_prefilled and (self.format is not None or selection.mode == "required"),
        }
        formats = [] if self.format is None else [FORMAT]
        check_formats(formats, bool(self.tools) and selection.mode != "none", breaking)
        return self

    @property
    def format(self) -> OutputFormat | None:
        return None if self.output_config is None else self.output_config.format

    @property
    def selection(self) -> ToolSelection:
        return ToolSelection() if self.tool_choice is None else self.tool_choice.selection

    @property
    def is_prefilled(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        return self.messages[-1].role == "assistant"

    def conversation(self) -> Conversation:
        """Raises APIError 400 for results without their calls, or the opposite."""
        messages = [Message("system", _text(self.system), source="system")] if self.system else []
        for index, message in enumerate(self.messages):
            for each in _turns(message, f"messages[{index}]"):
                if not messages or not (joined := _joined(messages[-1], each)):
                    messages.append(each)
                else:
                    messages[-1] = joined
        _check_calls(messages)
        tools = [Tool(t.name, t.description or "", t.input_schema, bool(t.strict)) for t in self.tools]
        arguments = {} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"}
        return Conversation(tuple(messages), self.selection.offered(tools), self.is_prefilled, arguments)


class MessagesRequest(CountMessagesTokensRequest):
    """POST /messages."""

    max_tokens: NumTokens

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise invalid("'min_tokens' must not be greater than 'max_tokens'.", "min_tokens")
        return self


def to_chat_job(body: MessagesRequest) -> ChatJob:
    """Raises APIError 400, see `conversation`."""
    is_parallel = body.tool_choice is None or not body.tool_choice.disable_parallel_tool_use
    return ChatJob(
        conversation=body.conversation(),
        sampling=body.sampling(body.max_tokens, None),
        stop=(*body.stop_strings, *(text for text in body.stop_sequences if text)),
        ignore_eos=body.ignore_eos,
        constraint=None if body.format is None else JsonAnswer(body.format.schema_, FORMAT),
        tool_use=body.selection.tool_use(is_parallel),
    )


def _turns(message: InputMessage, source: str) -> list[Message]:
    """Results of tools first, as they answer the turn before; then the text."""
    if isinstance(message.content, str):
        return [Message(message.role, message.content, source=source)]
    texts = [block.text for block in message.content if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
    calls = [
        ToolCall(block.id, block.name, json.dumps(block.input, ensure_ascii=False))
        for block in message.content
        if isinstance(block, ToolUseBlock)
    ]
    if len(calls) > MAX_CALLS:
        raise invalid(f"Invalid '{source}': more than {MAX_CALLS} tool calls.", source, "array_above_max_length")
    turns = [
        Message("tool", block.text, tool_call_id=block.tool_use_id, source=source)
        for block in message.content
        if isinstance(block, ToolResultBlock)
    ]
    if texts or calls or not turns:
        text, thought = PART_SEPARATOR.join(texts), PART_SEPARATOR.join(thoughts)
        turns.append(Message(message.role, text, tool_calls=tuple(calls), reasoning=thought, source=source))
    return turns


def _joined(first: Message, second: Message) -> Message | None:
    """Both as one message, if they are of one role."""
    if first.role != second.role or first.role in ("tool", "system"):
        return None
    text, thought = (
        PART_SEPARATOR.join(part for part in parts if part)
        for parts in ((first.content, second.content), (first.reasoning, second.reasoning))
    )
    calls = (*first.tool_calls, *second.tool_calls)
    return Message(first.role, text, tool_calls=calls, reasoning=thought, source=second.source)


def _check_calls(messages: Sequence[Message]) -> None:
    broken = unanswered_call([(m.tool_call_id, [call.id for call in m.tool_calls]) for m in messages])
    if broken is None:
        return
    index, call_ids = broken
    message = f"No tool_result block follows tool_use {', '.join(call_id[:64] for call_id in call_ids)}."
    if not call_ids:
        call_id = messages[index].tool_call_id or ""
        message = f"The tool_result of tool_use_id {call_id[:64]} has no tool_use block in the message before it."
    raise invalid(message, messages[index].source)


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else PART_SEPARATOR.join(block.text for block in content)
