"""A model's own Jinja chat template, rendered so that no text of a client can become a control token.

The template comes from the model and is trusted to write control tokens; what the client sent is not. Every name of a
control token inside client text is broken by a random mark before rendering, so that the template still sees (and may
trim, test or escape) the real text; afterwards the rendered string is cut at the control tokens that are whole, which
are the template's, and the marks are taken out of the rest. Text that names no control token is rendered untouched.
Left over: a template that compares client text with a control token's name does not recognise the broken name.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from serving.generation.interface import Conversation, Message, PromptError, Tool

# Annotated as str, it returns the rendered conversations and where their answers stand.
_render: Callable[..., Any] = render_jinja_template

# FastChat's vicuna_v1.1, for models that were trained with it and ship no template (Vicuna, WizardLM).
VICUNA = (
    "{{ bos_token }}"
    "{% if messages and messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}"
    "{% set system = 'A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user\\'s questions.' %}{% set turns = messages %}{% endif %}"
    "{{ system + ' ' }}"
    "{% for turn in turns %}"
    "{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Messages must alternate between user and assistant, user first.') }}{% endif %}"
    "{% if turn.role == 'user' %}{{ 'USER: ' + turn.content + ' ' }}"
    "{% elif turn.role == 'assistant' %}{{ 'ASSISTANT: ' + turn.content + eos_token }}"
    "{% else %}{{ raise_exception('This model has no role ' + turn.role + '.') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Piece:
    """A run of a prompt: plain text, or exactly one control token."""

    text: str
    is_control: bool


class ControlNames:
    """Finds the names of control tokens in text, and breaks them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted({name for name in names if len(name) > 1}, key=len, reverse=True)
        # Of two names that begin at one place the longer wins, as in the tokenizer.
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")

    def split(self, text: str) -> list[Piece]:
        """Cut at every name."""
        pieces: list[Piece] = []
        end = 0
        for match in self._pattern.finditer(text):
            pieces += (Piece(text[end : match.start()], False), Piece(match[0], True))
            end = match.end()
        pieces.append(Piece(text[end:], False))
        return [piece for piece in pieces if piece.text]

    def broken(self, text: str, mark: str) -> str:
        """Put the mark into every name, and where a beginning or an end of one touches the edge of the text."""
        while match := self._pattern.search(text):
            text = f"{text[: match.start() + 1]}{mark}{text[match.start() + 1 :]}"
        inner = text.strip()
        lead = text[: len(text) - len(text.lstrip())]
        tail = text[len(lead) + len(inner) :]
        ends_open = any(inner.endswith(name[:size]) for name in self._names for size in range(1, len(name)))
        begins_open = any(inner.startswith(name[size:]) for name in self._names for size in range(1, len(name)))
        return f"{lead}{mark if begins_open else ''}{inner}{mark if ends_open else ''}{tail}"


class ChatTemplate:
    """Conversation -> pieces of a prompt.

    source: the template; tool_source: another one, used when tools are given. token_names: bos_token, eos_token and
    so on, as the template refers to them. control_names: every text that the tokenizer reads as a control token.
    """

    def __init__(
        self, source: str, token_names: Mapping[str, str], control_names: Iterable[str], tool_source: str | None = None
    ) -> None:
        self._source, self._tool_source = source, tool_source or source
        self._token_names = dict(token_names)
        self._names = ControlNames(control_names)

    @property
    def has_tools(self) -> bool:
        """Whether the template knows what to do with tools."""
        return "tools" in self._tool_source

    def render(self, conversation: Conversation) -> list[Piece]:
        """The prompt, its control tokens apart from its text. Raises PromptError for what the template refuses."""
        if conversation.tools and not self.has_tools:
            raise PromptError("This model's chat template has no place for tools.", param="tools")
        if not conversation.messages:
            raise PromptError("The conversation is empty.")
        if conversation.continue_final and conversation.messages[-1].role != "assistant":
            raise PromptError("Only an assistant's message can be continued.")
        mark = f"{secrets.randbits(80):025d}"  # digits survive every filter of a template
        try:
            messages = [
                {**self._shielded(_plain_message(message), mark), "role": message.role}
                for message in conversation.messages
            ]
            tools = [self._shielded(_plain_tool(tool), mark) for tool in conversation.tools]
            rendered = self._rendered(messages, tools, conversation.continue_final, mark)
        except RecursionError:
            raise PromptError("The tools or the arguments of a call are nested too deeply.") from None
        self._refuse_lost_text(messages, rendered)
        return [Piece(piece.text.replace(mark, ""), piece.is_control) for piece in self._names.split(rendered)]

    def _shielded(self, value: Any, mark: str) -> Any:
        """The same value with every string and key broken."""
        match value:
            case str():
                return self._names.broken(value, mark)
            case list():
                return [self._shielded(item, mark) for item in value]
            case dict():
                return {self._names.broken(key, mark): self._shielded(item, mark) for key, item in value.items()}
            case _:
                return value

    def _rendered(self, messages: list[Any], tools: list[Any], continue_final: bool, mark: str) -> str:
        try:
            rendered: Any = _render(
                conversations=[messages],
                tools=tools or None,
                chat_template=self._tool_source if tools else self._source,
                continue_final_message=continue_final,
                add_generation_prompt=not continue_final,
                **self._token_names,
            )
        except (TemplateError, ValueError, TypeError) as error:
            # A template says no by raising; whatever it stumbles over is in the conversation, as the template is fixed.
            reason = str(error).replace(mark, "").split("\n")[0]
            raise PromptError(f"The model's chat template refuses this conversation: {reason}") from error
        return str(rendered[0][0])

    def _refuse_lost_text(self, messages: list[Any], rendered: str) -> None:
        """Some templates silently leave out what they have no place for. A client must hear of that."""
        for message in messages:
            content = message["content"].strip()
            as_json = json.dumps(content, ensure_ascii=False)[1:-1]
            if message["role"] in ("system", "user") and content not in rendered and as_json not in rendered:
                raise PromptError(f"The model's chat template has no place for this {message['role']} message.")


def _plain_message(message: Message) -> dict[str, Any]:
    """A message as templates expect it: OpenAI's fields, with the arguments of calls parsed."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _parsed(call.arguments)}}
            for call in message.tool_calls
        ]
    return plain


def _plain_tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _parsed(arguments: str) -> Any:
    """Templates write arguments as JSON themselves; text that is no JSON object goes in as it is."""
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments
