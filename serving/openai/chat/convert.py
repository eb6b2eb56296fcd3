"""Typed request bodies -> jobs for the chat layer. Pure; knows neither HTTP nor tokens' text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from serving.engine.interface import SamplingParams
from serving.generation.interface import Conversation, Message, Role, Tool, ToolCall
from serving.generation.pipeline import ChatJob, CompletionJob
from serving.generation.structured.grammar import AnswerConstraint, ChoiceAnswer, JsonAnswer, RegexAnswer, ToolUse
from serving.http.errors import invalid
from serving.openai.chat.messages import ChatMessage, FunctionDefinition, ToolDefinition
from serving.openai.chat.request import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    TokenizeRequest,
    offers_tools,
    requested_length,
)
from serving.openai.chat.structured_outputs import AllowedToolsChoice, ChosenFunction, NamedTool

DEFAULT_CHAT_TOKENS = 2048  # the documented default of ChatGLM2's API; fewer where the context has no room
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of /completions
PART_SEPARATOR = "\n"  # between the text parts of one message

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def to_chat_job(body: ChatRequest) -> ChatJob:
    """What the chat layer needs of a chat request."""
    tools = _offered(body)
    return ChatJob(
        conversation=to_conversation(body.messages, tools, body.continue_final_message),
        sampling=_sampling(body, DEFAULT_CHAT_TOKENS, _num_top_logprobs(body)),
        stop=_stop(body),
        n=body.n,
        max_tokens_is_default=requested_length(body) is None,
        ignore_eos=body.ignore_eos,
        constraint=_constraint(body),
        tool_use=_tool_use(body),
    )


def _offered(body: ChatRequest) -> tuple[Tool, ...]:
    """The tools that the model is told of."""
    if not offers_tools(body):
        return ()
    tools = to_tools(body.tools) or _to_tools(body.functions)
    if not isinstance(body.tool_choice, AllowedToolsChoice):
        return tools
    allowed = {tool.function.name for tool in body.tool_choice.allowed_tools.tools}
    return tuple(tool for tool in tools if tool.name in allowed)


def _tool_use(body: ChatRequest) -> ToolUse:
    match body.tool_choice or body.function_call:
        case "required":
            return ToolUse(is_required=True, is_parallel=body.parallel_tool_calls)
        case NamedTool(function=function):
            return ToolUse(is_required=True, name=function.name, is_parallel=False)
        case ChosenFunction(name=name):
            return ToolUse(is_required=True, name=name, is_parallel=False)
        case AllowedToolsChoice(allowed_tools=allowed):
            return ToolUse(is_required=allowed.mode == "required", is_parallel=body.parallel_tool_calls)
        case _:
            return ToolUse(is_parallel=body.parallel_tool_calls and not body.functions)


def _constraint(body: ChatRequest) -> AnswerConstraint | None:
    form = body.response_format
    if form is not None and form.type == "json_object":
        return JsonAnswer({"type": "object"}, "response_format")
    if form is not None and form.json_schema is not None:
        described = form.json_schema
        return JsonAnswer(described.schema_, "response_format", described.name, bool(described.strict))
    if body.guided_json is not None:
        return JsonAnswer(_guided_schema(body.guided_json), "guided_json")
    if body.guided_regex is not None:
        return RegexAnswer(body.guided_regex, "guided_regex")
    if body.guided_choice is not None:
        return ChoiceAnswer(tuple(body.guided_choice), "guided_choice")
    return None


def _guided_schema(given: str | dict[str, Any]) -> dict[str, Any]:
    """vLLM takes the schema as an object or as its text."""
    if not isinstance(given, str):
        return given
    try:
        parsed: Any = json.loads(given)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise invalid("Invalid 'guided_json': expected a JSON schema, as an object or as its text.", "guided_json")
    return cast("dict[str, Any]", parsed)


def to_text_jobs(body: CompletionRequest, max_answers: int) -> list[CompletionJob]:
    """One job for each prompt. Raises APIError 400 when all prompts together ask for more than `max_answers`."""
    prompts = to_prompts(body.prompt)
    best_of = body.best_of or body.n
    if len(prompts) * best_of > max_answers:
        raise invalid(
            f"You requested {len(prompts) * best_of} completions in total (prompts times the larger of 'n' and "
            f"'best_of'); at most {max_answers} are allowed in one request.",
            "prompt" if best_of == 1 else "n",
        )
    num_top_logprobs = body.logprobs
    if num_top_logprobs is None and (best_of > body.n or _counts_running(body)):
        num_top_logprobs = 0  # to rank the candidates, or to count their tokens as they come
    return [
        CompletionJob(
            prompt=prompt,
            sampling=_sampling(body, DEFAULT_COMPLETION_TOKENS, num_top_logprobs),
            stop=_stop(body),
            n=body.n,
            best_of=best_of,
            max_tokens_is_default=requested_length(body) is None,
            echo=body.echo,
            ignore_eos=body.ignore_eos,
        )
        for prompt in prompts
    ]


def to_conversation(messages: list[ChatMessage], tools: tuple[Tool, ...], continue_final: bool) -> Conversation:
    """The messages with their roles reduced to the four that formats know."""
    return Conversation(tuple(_message(message) for message in messages), tools, continue_final)


def to_tools(tools: list[ToolDefinition]) -> tuple[Tool, ...]:
    """Tool definitions without their JSON wrapping."""
    return _to_tools([tool.function for tool in tools])


def _to_tools(functions: Sequence[FunctionDefinition]) -> tuple[Tool, ...]:
    return tuple(Tool(f.name, f.description or "", f.parameters or {}, bool(f.strict)) for f in functions)


def to_tokenize_conversation(body: TokenizeRequest) -> Conversation | None:
    """The conversation of a /tokenize request, None if it has a raw prompt."""
    if body.messages is None:
        return None
    return to_conversation(body.messages, to_tools(body.tools), body.continue_final_message)


def _message(message: ChatMessage) -> Message:
    content = message.content
    text = content if isinstance(content, str) else PART_SEPARATOR.join(part.text for part in content or [])
    calls = [ToolCall(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or []]
    if message.function_call is not None:
        # legacy calls have no id: the function's name ties the call to its result
        calls.append(ToolCall(message.function_call.name, message.function_call.name, message.function_call.arguments))
    call_id = message.name if message.role == "function" else message.tool_call_id
    if not text and not calls and message.refusal is not None:
        text = message.refusal
    return Message(ROLES[message.role], text, message.name, tuple(calls), call_id)


def to_prompts(value: str | list[str] | list[int] | list[list[int]]) -> list[str | tuple[int, ...]]:
    """The prompts or inputs of one request, each a text or token ids."""
    if isinstance(value, str):
        return [value]
    texts = [item for item in value if isinstance(item, str)]
    if texts:
        return list(texts)
    lists = [tuple(item) for item in value if isinstance(item, list)]
    if lists:
        return list(lists)
    return [tuple(item for item in value if isinstance(item, int))]


def _num_top_logprobs(body: ChatRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    return 0 if _counts_running(body) else None


def _counts_running(body: GenerationRequest) -> bool:
    """Running token counts are read off the log-probabilities, the one place where events tell tokens apart."""
    return body.stream_options is not None and body.stream_options.continuous_usage_stats


def _stop(body: GenerationRequest) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def _sampling(body: GenerationRequest, default_tokens: int, num_top_logprobs: int | None) -> SamplingParams:
    length = requested_length(body)
    return SamplingParams(
        max_tokens=default_tokens if length is None else length,
        temperature=float(body.temperature),
        top_p=float(body.top_p),
        top_k=max(body.top_k, 0),
        min_p=float(body.min_p),
        repetition_penalty=float(body.repetition_penalty),
        presence_penalty=float(body.presence_penalty),
        frequency_penalty=float(body.frequency_penalty),
        logit_bias=tuple((int(token_id), float(bias)) for token_id, bias in body.logit_bias.items()),
        # generators want seeds that are not negative; below 2**62 there is room to count up for further choices
        seed=None if body.seed is None else body.seed % 2**62,
        min_tokens=body.min_tokens,
        num_top_logprobs=num_top_logprobs,
    )
