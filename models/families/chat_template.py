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
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from models.tokenizers.tokenizer_json import PromptPiece
from serving.generation.interface import Conversation, Message, PromptError, Tool, ToolCall
from serving.generation.reasoning import CLOSING, OPENING, split_reasoning

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
    """Finds the names of control tokens in text, and interrupts them. Each takes one pass over the text."""

    def __init__(self, names: Iterable[str]) -> None:
        names = {name for name in names if len(name) > 1}
        pattern = _any_of(names) if names else r"(?!)"
        self._pattern = re.compile(pattern)
        # a name may begin inside another one, so the search goes on at the next character
        self._first_character = re.compile(f"(?={pattern}).", re.DOTALL)
        splits = [(name[:size], name[size:]) for name in names for size in range(1, len(name))]
        self._beginnings = {beginning for beginning, _ in splits}
        self._endings = {ending for _, ending in splits}
        self._sizes = sorted({len(part) for part in self._beginnings})

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
        text = self._first_character.sub(lambda match: match[0] + marker, text)
        inner = text.strip()
        leading = text[: len(text) - len(text.lstrip())]
        trailing = text[len(leading) + len(inner) :]
        before = marker if any(inner[:size] in self._endings for size in self._sizes) else ""
        after = marker if any(inner[-size:] in self._beginnings for size in self._sizes) else ""
        return f"{leading}{before}{inner}{after}{trailing}"


def _any_of(names: Set[str]) -> str:
    """A pattern that matches the longest of these names, as the tokenizer does, trying each character of a text once.

    Names with the same beginning share it: a model may have thousands, and an alternation would try them one by one.
    """
    rests: dict[str, set[str]] = {}
    for name in names - {""}:
        rests.setdefault(name[0], set()).add(name[1:])
    if not rests:
        return ""
    parts: list[str] = []
    for first, following in rests.items():
        low, high = min(following), max(following)
        shared = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
        parts.append(re.escape(first + low[:shared]) + _any_of({rest[shared:] for rest in following}))
    return f"(?:{'|'.join(sorted(parts))}){'?' if '' in names else ''}"


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

    @property
    def has_reasoning(self) -> bool:
        """Whether the template knows the marks around a model's thoughts."""
        return OPENING in self._source or CLOSING in self._source

    def render(self, conversation: Conversation) -> list[PromptPiece]:
        """The prompt. Raises PromptError for conversations that the template refuses."""
        if conversation.tools and not self.has_tools:
            raise PromptError("This model's chat template has no place for tools.", param="tools")
        if not conversation.messages:
            raise PromptError("The conversation is empty.")
        if conversation.continue_final and conversation.messages[-1].role != "assistant":
            raise PromptError("Only an assistant's message can be continued.")
        try:
            return self._pieces(conversation, has_texts_as_objects=False)
        except PromptError:
            calls = [call for message in conversation.messages for call in message.tool_calls]
            if all(isinstance(call.parsed_arguments, dict) for call in calls):
                raise
            # some templates read the arguments of calls as an object, which cut JSON is not
            return self._pieces(conversation, has_texts_as_objects=True)

    def _pieces(self, conversation: Conversation, has_texts_as_objects: bool) -> list[PromptPiece]:
        marker = f"{secrets.randbits(80):025d}"  # digits survive every filter of a template
        try:
            messages = [
                {"role": message.role, **self._escaped(_openai_fields(message, has_texts_as_objects), marker)}
                for message in conversation.messages
            ]
            tools = [self._escaped(_openai_tool(tool), marker) for tool in conversation.tools]
            arguments = self._escaped(dict(conversation.template_arguments), marker)
            rendered = self._rendered(messages, tools, conversation.continue_final, arguments, marker)
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

    def _rendered(
        self, messages: list[Any], tools: list[Any], continue_final: bool, arguments: dict[str, Any], marker: str
    ) -> str:
        try:
            rendered: Any = _render(
                conversations=[messages],
                tools=tools or None,
                chat_template=self._tool_source if tools else self._source,
                continue_final_message=continue_final,
                add_generation_prompt=not continue_final,
                **(arguments | self._token_names),
            )
        except (TemplateError, ValueError, TypeError) as error:
            # a template refuses by raising; any other failure is caused by the conversation too, the template is fixed
            reason = str(error).replace(marker, "").split("\n")[0]
            raise PromptError(f"The model's chat template refuses this conversation: {reason}") from error
        return str(rendered[0][0])

    def _refuse_lost_text(self, messages: list[Any], rendered: str) -> None:
        """Raise PromptError if the template silently left a message out, as some do.

        Each message is searched behind the last one first, so that a long conversation is read once.
        """
        end = 0
        is_json = {"system": False, "user": False}  # how the template wrote the last message of each role
        for message in messages:
            role = message["role"]
            if role not in is_json:
                continue
            content = message["content"].strip()
            forms = (content, json.dumps(content, ensure_ascii=False)[1:-1])
            tried = [(start, form) for start in (end, 0) for form in (is_json[role], not is_json[role])]
            found = ((rendered.find(forms[form], start), form) for start, form in tried)
            position, is_json[role] = next((hit for hit in found if hit[0] >= 0), (-1, False))
            if position < 0:
                raise PromptError(f"The model's chat template has no place for this {role} message.")
            end = position + len(forms[is_json[role]])


def _openai_fields(message: Message, has_texts_as_objects: bool) -> dict[str, Any]:
    """A message as templates expect it, but for its role: OpenAI's fields, with the arguments of calls parsed.

    Text that is not a JSON object stays text, or becomes an object with that text.
    """
    reasoning, content = message.reasoning, message.content
    if message.role == "assistant" and not reasoning:
        reasoning, content = split_reasoning(content)  # in client text the template would not find the marks
    fields: dict[str, Any] = {"content": content}
    if reasoning:
        fields["reasoning_content"] = reasoning
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [_openai_call(call, has_texts_as_objects) for call in message.tool_calls]
    return fields


def _openai_call(call: ToolCall, has_text_as_object: bool) -> dict[str, Any]:
    arguments = call.parsed_arguments
    if has_text_as_object and isinstance(arguments, str):
        arguments = {"arguments": arguments}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _openai_tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}
