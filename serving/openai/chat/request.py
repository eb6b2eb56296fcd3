"""The body of a chat request, field by field -> the job for the generation pipeline.

A field is honoured, accepted without effect (ACCEPTED_WITHOUT_EFFECT), refused with a reason (`RequestBody.refused`)
or unknown and refused. The pipeline trusts what passed here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from serving.generation.interface import Conversation, Tool
from serving.generation.pipeline import ChatJob
from serving.generation.structured.grammar import USE_IF_WANTED, ToolUse
from serving.http.errors import invalid
from serving.openai import common
from serving.openai.chat.messages import ChatMessage, check_calls_are_answered
from serving.openai.chat.structured_outputs import (
    Choices,
    GuidedJson,
    Guides,
    Pattern,
    ResponseFormat,
    StructuredOutputs,
    check_formats,
    check_response_format,
    to_constraint,
)
from serving.openai.chat.tools import (
    MAX_TOOLS,
    FunctionChoice,
    FunctionDefinition,
    ToolChoice,
    ToolDefinition,
    check_functions,
    check_tools,
    to_selection,
)
from serving.openai.common import ChoicesRequest, StrictModel, TokenId

DEFAULT_MAX_TOKENS = 2048  # the documented default of ChatGLM2's API; fewer where the context ends before
ACCEPTED_WITHOUT_EFFECT = {
    **common.ACCEPTED_WITHOUT_EFFECT,
    "prompt_cache_retention": "the cache keeps what fits",
    "prompt_cache_options": "as `prompt_cache_retention`",
    "verbosity": "the model was not trained for it",
    "reasoning_effort": "but for `none`, which turns thoughts off where the chat template has the switch",
    "web_search_options": "the server does not search the web",
    "moderation": "answers are not moderated; the mode `block` is refused",
    "prediction": "speeds up, never changes an answer; not needed here",
    "modalities": "only `text` exists",
}


RESERVED_ARGUMENTS = frozenset(
    (
        *("conversations", "messages", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
    )
)


class ThinkingSwitch(StrictModel):
    """Whether a model that can reason before it answers does; other models have no such switch."""

    type: Literal["enabled", "disabled"]
    budget_tokens: int | None = None  # without effect
    clear_thinking: bool | None = None  # without effect


class ChatRequest(ChoicesRequest):
    """POST /chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]

    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    tools: list[ToolDefinition] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    functions: list[FunctionDefinition] = Field([], min_length=1, max_length=MAX_TOOLS)
    function_call: FunctionChoice | None = None
    response_format: ResponseFormat | None = None
    guided_json: GuidedJson | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    structured_outputs: StructuredOutputs | None = None
    stop_token_ids: list[TokenId] = Field([], max_length=64)
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    enable_thinking: bool | None = None
    thinking: ThinkingSwitch | None = None

    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    web_search_options: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.tools or self.tool_choice is not None:
            check_tools([tool.name for tool in self.tools], to_selection(self.tool_choice))
        if self.functions or self.function_call is not None:
            check_functions(self.functions, self.function_call, bool(self.tools) or self.tool_choice is not None)
        if any(message.role == "tool" or message.tool_calls for message in self.messages):
            check_calls_are_answered(self.messages)
        if self.response_format is not None:
            check_response_format(self.response_format)
        if self.has_formats or self.offers_tools:
            _check_formats(self)
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("'top_logprobs' is only allowed when 'logprobs' is true.", "top_logprobs")
        _check_continuation(self)
        for name in self.chat_template_kwargs or {}:
            if name in RESERVED_ARGUMENTS:
                raise invalid(f"'chat_template_kwargs.{name}' is set by the server.", f"chat_template_kwargs.{name}")
        if self.moderation is not None and self.moderation.get("mode") == "block":
            raise invalid("Answers are not moderated: the mode 'block' is not supported.", "moderation.mode")
        return self

    @property
    def guides(self) -> Guides:
        """vLLM's fields for the answer's format, by either name."""
        new = self.structured_outputs or StructuredOutputs()
        return Guides(
            self.guided_json if new.json_ is None else new.json_,
            self.guided_regex if new.regex is None else new.regex,
            self.guided_choice if new.choice is None else new.choice,
        )

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What the chat template of a model that has such switches gets."""
        found = dict(self.chat_template_kwargs or {})
        if self.enable_thinking is not None:
            found.setdefault("enable_thinking", self.enable_thinking)
        if self.thinking is not None:
            found.setdefault("enable_thinking", self.thinking.type == "enabled")
        if self.reasoning_effort == "none":
            found.setdefault("enable_thinking", False)
        return found

    @property
    def has_formats(self) -> bool:
        """Whether a field describes the answer's format."""
        return self.response_format is not None or any(guide is not None for guide in self.guides)

    @property
    def offers_tools(self) -> bool:
        """Whether the prompt describes any tool."""
        return bool(self.tools or self.functions) and "none" not in (self.tool_choice, self.function_call)


def _check_formats(body: ChatRequest) -> None:
    if body.structured_outputs is not None and (body.guided_json or body.guided_regex or body.guided_choice):
        message = "'structured_outputs' and the 'guided_' fields are two names of the same: use one."
        raise invalid(message, "structured_outputs")
    is_given = {
        "response_format": body.response_format is not None and body.response_format.type != "text",
        **{f"guided_{name}": guide is not None for name, guide in body.guides._asdict().items()},
    }
    breaking = {
        "ignore_eos": body.ignore_eos,
        "min_tokens": body.min_tokens > 0,
        "stop_token_ids": bool(body.stop_token_ids),
        "continue_final_message": body.continue_final_message,
    }
    check_formats([field for field, given in is_given.items() if given], body.offers_tools, breaking)


def _check_continuation(body: ChatRequest) -> None:
    if not body.continue_final_message:
        if body.add_generation_prompt is False:
            message = "'add_generation_prompt' may only be false with 'continue_final_message'."
            raise invalid(message, "add_generation_prompt")
        return
    if body.add_generation_prompt:
        message = "'continue_final_message' and 'add_generation_prompt' cannot both be true."
        raise invalid(message, "continue_final_message")
    last = body.messages[-1]
    if last.role != "assistant" or last.content is None:
        message = "'continue_final_message' needs a last message of the assistant."
        raise invalid(message, "continue_final_message")


def to_chat_job(body: ChatRequest) -> ChatJob:
    """Raises APIError 400 for a text in `guided_json` that is no schema."""
    tools: tuple[Tool, ...] = ()
    tool_use: ToolUse = USE_IF_WANTED
    if body.tools or body.functions:
        selection = to_selection(body.tool_choice or body.function_call)
        tools = selection.offered([each.tool for each in body.tools or body.functions])
        tool_use = selection.tool_use(body.parallel_tool_calls and not body.functions)
    constraint = None
    if body.has_formats:
        constraint = to_constraint(body.response_format, *body.guides)
    length = body.requested_length
    return ChatJob(
        conversation=Conversation(
            tuple(message.to_message(index) for index, message in enumerate(body.messages)),
            tools,
            body.continue_final_message,
            body.template_arguments,
        ),
        sampling=replace(
            body.sampling(length or DEFAULT_MAX_TOKENS, (body.top_logprobs or 0) if body.logprobs else None),
            stop_token_ids=frozenset(body.stop_token_ids),
        ),
        stop=body.stop_strings,
        n=body.n,
        max_tokens_is_default=length is None,
        ignore_eos=body.ignore_eos,
        constraint=constraint,
        tool_use=tool_use,
    )
