"""Conversation with tools -> prompt ids of a model that was not trained to call tools.

The system message describes the tools and the syntax of a call. An earlier call becomes text of the assistant in that
syntax. The results of tools become a user message; a user message that follows is appended to it, so that user and
assistant alternate.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from serving.generation.interface import (
    ChatFormat,
    Conversation,
    Language,
    Message,
    PromptError,
    Role,
    Tool,
    ToolCall,
    ToolSyntax,
)

PLAIN = ToolSyntax("<tool_call>", '{"name": "{name}", "arguments": ', "}</tool_call>")


@dataclass(frozen=True)
class ToolInstructions:
    """Texts for the model, in one language."""

    tools: str  # {tools}: one line a tool
    result: str  # {name}, {content}


INSTRUCTIONS: dict[Language, ToolInstructions] = {
    "zh": ToolInstructions(
        "你可以调用以下工具：\n{tools}\n"
        "需要调用工具时，只按下面的格式输出，不要输出别的内容：\n"
        '<tool_call>{"name": "工具名", "arguments": {"参数名": "参数值"}}</tool_call>\n'
        "不需要工具，或者已经得到工具的结果时，直接回答问题。\n",
        "工具 {name} 的结果：\n{content}",
    ),
    "en": ToolInstructions(
        "You can call these tools:\n{tools}\n"
        "To call a tool, write only this and nothing else:\n"
        '<tool_call>{"name": "tool name", "arguments": {"parameter": "value"}}</tool_call>\n'
        "If no tool is needed, or its result is already there, answer directly.\n",
        "Result of the tool {name}:\n{content}",
    ),
}


def render(chat_format: ChatFormat, conversation: Conversation, context_length: int | None = None) -> list[int]:
    """The prompt of a conversation that uses tools, for a chat format without a tool syntax, as `ChatFormat.render`."""
    plain = without_tools(conversation, chat_format.language)
    try:
        return chat_format.render(plain, context_length)
    except PromptError:
        merged = _system_as_user(plain)
        if merged is None:
            raise
        return chat_format.render(merged, context_length)  # the format has no system message


def without_tools(conversation: Conversation, language: Language) -> Conversation:
    """The same conversation with tools, calls and results written as text."""
    instructions = INSTRUCTIONS[language]
    turns: list[tuple[Role, list[str], str]] = []  # the texts of one turn are joined at the end: there may be thousands
    names: dict[str, str] = {}  # of the tools called, by the id of the call
    ends_with_result = False
    for message in conversation.messages:
        names |= {call.id: call.name for call in message.tool_calls}
        text = message.content
        if message.role == "tool":
            name = names.get(message.tool_call_id or "", message.name or "")
            text = instructions.result.replace("{name}", name).replace("{content}", text)
        elif message.tool_calls:
            written = PLAIN.separator.join(_written(call) for call in message.tool_calls)
            text = f"{text}\n{written}" if text else written
        if ends_with_result and message.role in ("user", "tool"):
            turns[-1][1].append(text)
        else:
            turns.append(("user" if message.role == "tool" else message.role, [text], message.source))
        ends_with_result = message.role == "tool"
    messages = [Message(role, "\n\n".join(texts), source=source) for role, texts, source in turns]
    if conversation.tools:
        messages = _with_system(messages, instructions.tools.replace("{tools}", _listing(conversation.tools)))
    return replace(conversation, messages=tuple(messages), tools=())


def _with_system(messages: list[Message], text: str) -> list[Message]:
    if messages and messages[0].role == "system":
        return [replace(messages[0], content=f"{messages[0].content}\n\n{text}\n"), *messages[1:]]
    return [Message("system", f"{text}\n"), *messages]


def _system_as_user(conversation: Conversation) -> Conversation | None:
    """The system message merged into the first user message; None if the conversation does not begin with these two."""
    match conversation.messages:
        case (Message(role="system") as system, Message(role="user") as user, *rest):
            return replace(conversation, messages=(replace(user, content=f"{system.content}\n{user.content}"), *rest))
        case _:
            return None


def _written(call: ToolCall) -> str:
    parsed = call.parsed_arguments
    arguments = call.arguments if parsed and isinstance(parsed, dict) else json.dumps(parsed, ensure_ascii=False)
    return f"{PLAIN.opening}{PLAIN.before.replace('{name}', call.name)}{arguments}{PLAIN.after}"


def _listing(tools: Sequence[Tool]) -> str:
    listed = ({"name": t.name, "description": t.description, "parameters": dict(t.parameters)} for t in tools)
    return "\n".join(json.dumps(tool, ensure_ascii=False) for tool in listed)
