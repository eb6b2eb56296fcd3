"""A conversation -> the pieces of a prompt, by a model's own Jinja chat template.

The template comes from the model and may write control tokens; text of a client may not. Every name of a control token
inside client text is interrupted by a random marker before rendering, so that the template still has (and may trim,
test or escape) the real text. Afterwards the rendered string is split at the control tokens that are intact, which are
the template's, and the markers are removed from the rest. Text that names no control token is rendered as it is.
Known limit: a template that compares client text with a control token's name does not find the interrupted name.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from models.tokenizers.tokenizer_json import PromptPiece
from serving.generation.interface import Conversation, Message, PromptError, Tool

# Annotated as str, it returns the rendered conversations and the positions of their answers.
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


class ControlNames:
    """Finds the names of control tokens in text, and interrupts them."""

    def __init__(self, names: Iterable[str]) -> None:
        longest_first = sorted({name for name in names if len(name) > 1}, key=len, reverse=True)
        splits = [(name[:size], name[size:]) for name in longest_first for size in range(1, len(name))]
        self._beginnings = tuple(beginning for beginning, _ in splits)
        self._endings = tuple(ending for _, ending in splits)
        # of two names that begin at the same character the longer one is found, as in the tokenizer
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def split(self, text: str) -> list[PromptPiece]:
        """Split at every name."""
        pieces: list[PromptPiece] = []
        end = 0
        for match in self._pattern.finditer(text):
            pieces += (PromptPiece(text[end : match.start()], False), PromptPiece(match[0], True))
            end = match.end()
        pieces.append(PromptPiece(text[end:], False))
        return [piece for piece in pieces if piece.text]

    def interrupted(self, text: str, marker: str) -> str:
        """Put the marker into every name, and at an edge of the text that ends or begins with a part of one."""
        while match := self._pattern.search(text):
            text = f"{text[: match.start() + 1]}{marker}{text[match.start() + 1 :]}"
        inner = text.strip()
        leading = text[: len(text) - len(text.lstrip())]
        trailing = text[len(leading) + len(inner) :]
        before = marker if inner.startswith(self._endings) else ""
        after = marker if inner.endswith(self._beginnings) else ""
        return f"{leading}{before}{inner}{after}{trailing}"


class ChatTemplate:
    """Conversation -> pieces of a prompt.

    source: the template; tool_source: another one, used when tools are given. token_names: the template's variables
    bos_token, eos_token and so on. control_names: every text that the tokenizer reads as a control token.
    """

    def __init__(
        self, source: str, token_names: Mapping[str, str], control_names: Iterable[str], tool_source: str | None = None
    ) -> None:
        self._source, self._tool_source = source, tool_source or source
        self._token_names = dict(token_names)
        self._names = ControlNames(control_names)

    @property
    def has_tools(self) -> bool:
        """Whether the template renders tools."""
        return "tools" in self._tool_source

    def render(self, conversation: Conversation) -> list[PromptPiece]:
        """The prompt. Raises PromptError for conversations that the template refuses."""
        if conversation.tools and not self.has_tools:
            raise PromptError("This model's chat template has no place for tools.", param="tools")
        if not conversation.messages:
            raise PromptError("The conversation is empty.")
        if conversation.continue_final and conversation.messages[-1].role != "assistant":
            raise PromptError("Only an assistant's message can be continued.")
        marker = f"{secrets.randbits(80):025d}"  # digits survive every filter of a template
        try:
            messages = [
                {**self._escaped(_openai_message(message), marker), "role": message.role}
                for message in conversation.messages
            ]
            tools = [self._escaped(_openai_tool(tool), marker) for tool in conversation.tools]
            rendered = self._rendered(messages, tools, conversation.continue_final, marker)
        except RecursionError:
            raise PromptError("The tools or the arguments of a call are nested too deeply.") from None
        self._refuse_lost_text(messages, rendered)
        return [PromptPiece(piece.text.replace(marker, ""), piece.is_control) for piece in self._names.split(rendered)]

    def _escaped(self, value: Any, marker: str) -> Any:
        """The same value with the names in all its strings and keys interrupted."""
        match value:
            case str():
                return self._names.interrupted(value, marker)
            case list():
                return [self._escaped(item, marker) for item in value]
            case dict():
                return {
                    self._names.interrupted(key, marker): self._escaped(item, marker) for key, item in value.items()
                }
            case _:
                return value

    def _rendered(self, messages: list[Any], tools: list[Any], continue_final: bool, marker: str) -> str:
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
            # a template refuses by raising; any other failure is caused by the conversation too, the template is fixed
            reason = str(error).replace(marker, "").split("\n")[0]
            raise PromptError(f"The model's chat template refuses this conversation: {reason}") from error
        return str(rendered[0][0])

    def _refuse_lost_text(self, messages: list[Any], rendered: str) -> None:
        """Raise PromptError if the template silently left a message out, as some do."""
        for message in messages:
            content = message["content"].strip()
            as_json = json.dumps(content, ensure_ascii=False)[1:-1]
            if message["role"] in ("system", "user") and content not in rendered and as_json not in rendered:
                raise PromptError(f"The model's chat template has no place for this {message['role']} message.")


def _openai_message(message: Message) -> dict[str, Any]:
    """A message as templates expect it: OpenAI's fields, with the arguments of calls parsed."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _parsed(call.arguments)}}
            for call in message.tool_calls
        ]
    return fields


def _openai_tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _parsed(arguments: str) -> Any:
    """Templates write arguments as JSON themselves; text that is not a JSON object stays text."""
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments
