"""A request of /responses, said as a chat request, and its complaints, said in the client's words. Pure."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from serving.http.errors import APIError
from serving.openai.chat.request import ChatRequest
from serving.openai.errors import from_exception
from serving.openai.responses.request import (
    FunctionCallItem,
    FunctionOutputItem,
    FunctionTool,
    InputItem,
    InputText,
    MessageItem,
    ResponsesRequest,
    TextFormat,
)
from serving.openai.validation import validate

SAME_NAME = (
    *("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "seed", "stop", "min_tokens", "ignore_eos", "stream", "parallel_tool_calls"),
)
# param of a chat request -> param of this endpoint
RENAMED = (
    (re.compile(r"^messages.*"), "input"),
    (re.compile(r"^(?:max_tokens|max_completion_tokens)$"), "max_output_tokens"),
    (re.compile(r"^response_format\.json_schema"), "text.format"),
    (re.compile(r"^response_format"), "text.format"),
    (re.compile(r"^(tools\[\d+\]|tool_choice)\.function"), r"\1"),
    (re.compile(r"^tool_choice\.allowed_tools"), "tool_choice"),
)


def to_chat_request(body: ResponsesRequest) -> ChatRequest:
    """The same request for the chat endpoint. Raises APIError 400 naming the field of this endpoint."""
    chat: dict[str, Any] = {name: getattr(body, name) for name in SAME_NAME if name in body.model_fields_set}
    chat["messages"] = _messages(body)
    if body.max_output_tokens is not None:
        chat["max_completion_tokens"] = body.max_output_tokens
    if body.shows_logprobs:
        chat |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if body.tools:
        chat["tools"] = [_tool(tool) for tool in body.tools]
    if body.tool_choice is not None:
        chat["tool_choice"] = _tool_choice(body.tool_choice)
    if body.text is not None and body.text.format is not None:
        chat["response_format"] = _response_format(body.text.format)
    try:
        return validate(ChatRequest, chat)
    except APIError as error:
        raise in_own_words(error) from None


def in_own_words(error: Exception) -> APIError:
    """What went wrong with the chat request, with the field's name at this endpoint."""
    failure = from_exception(error)
    if failure.param is None:
        return failure
    param = failure.param
    for pattern, name in RENAMED:
        param = pattern.sub(name, param)
    return replace(failure, message=failure.message.replace(f"'{failure.param}'", f"'{param}'"), param=param)


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        _append(messages, item)
    return messages


def _append(messages: list[dict[str, Any]], item: InputItem) -> None:
    match item:
        case MessageItem():
            messages.append({"role": item.role, "content": _content(item.content)})
        case FunctionCallItem():
            # the calls of one answer, and its text, are one message of a chat
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            call = {"name": item.name, "arguments": item.arguments}
            messages[-1].setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": call})
        case FunctionOutputItem():
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})


def _content(content: str | list[InputText]) -> str | list[dict[str, str]]:
    return content if isinstance(content, str) else [{"type": "text", "text": part.text} for part in content]


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _tool_choice(choice: str | dict[str, Any]) -> Any:
    if isinstance(choice, str):
        return choice
    rest = {key: value for key, value in choice.items() if key != "type"}
    match choice.get("type"):
        case "function":
            return {"type": "function", "function": rest}
        case "allowed_tools":
            tools = rest.get("tools")
            if isinstance(tools, list):
                rest["tools"] = [_tool_choice(tool) if isinstance(tool, dict) else tool for tool in tools]
            return {"type": "allowed_tools", "allowed_tools": rest}
        case _:
            return choice


def _response_format(text_format: TextFormat) -> dict[str, Any]:
    rest = text_format.model_dump(exclude={"type"}, exclude_none=True)
    if text_format.type != "json_schema":
        return {"type": text_format.type, **rest}
    return {"type": "json_schema", "json_schema": rest}
