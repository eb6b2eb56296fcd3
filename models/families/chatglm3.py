"""ChatGLM3-6B: conversations with role tokens, observations and tool calls. Weights and tokenizer are ChatGLM2's."""

from __future__ import annotations

import json
import keyword
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.precision import Progress
from models.families.answer_parsers import TrimmedAnswers
from models.families.chatglm2 import PREFIX, ROPE, TOKENIZER_FILE, import_checkpoint
from models.families.decoder import load_with
from models.family import Family, ImportRefused
from models.tokenizers.sentencepiece import NUM_SPECIALS, SentencePieceTokenizer
from serving.generation.interface import (
    Conversation,
    Language,
    Message,
    PromptError,
    Tool,
    ToolCall,
    ToolSyntax,
)

Segment = tuple[int, str, str]  # (the id of the role token, the metadata on its line, the content)
NUM_ROLES = 4  # <|system|>, <|user|>, <|assistant|>, <|observation|>, after the specials
TOOL_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"

# The name on the first line and a fenced Python call below, as trained; its arguments are JSON, so that a schema can be
# enforced: `tool_call(**{"city": "x"})`, where the training data had `tool_call(city='x')`.
CALL = ToolSyntax("{name}\n", " ```python\ntool_call(**", ")\n```", is_at_start=True)


class ChatGLM3Format(TrimmedAnswers[SentencePieceTokenizer]):
    """Conversation -> ids and back. Every segment is encoded on its own, between role tokens that are added as ids.

    Source: tokenization_chatglm.py of ChatGLM3, build_chat_input.
    """

    tool_syntax: ToolSyntax | None = CALL
    language: Language = "zh"

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        super().__init__(tokenizer)
        system = tokenizer.num_pieces + NUM_SPECIALS
        self._system, self._user, self._assistant, self._observation = range(system, system + NUM_ROLES)
        self.stop_token_ids = frozenset({tokenizer.eos, self._user, self._observation})
        self.num_tokens = tokenizer.num_tokens

    def render(self, conversation: Conversation, context_length: int | None = None) -> list[int]:
        messages = _with_tool_prompt(conversation.messages, conversation.tools)
        _check_end(conversation)
        segments: list[Segment] = []
        for i, message in enumerate(messages):
            is_continued = conversation.continue_final and i == len(messages) - 1
            segments += self._segments(message, is_continued)
        self._tokenizer.bound.check((content for _, _, content in segments), context_length, "messages")
        ids = [self._tokenizer.gmask, self._tokenizer.sop]
        for role, metadata, content in segments:
            ids += [role, *self._tokenizer.encode(f"{metadata}\n"), *self._tokenizer.encode(content)]
        return ids if conversation.continue_final else [*ids, self._assistant]

    def encode(self, text: str, context_length: int | None = None) -> list[int]:
        self._tokenizer.bound.check((text,), context_length, "prompt")
        return [self._tokenizer.gmask, self._tokenizer.sop, *self._tokenizer.encode(text, "prompt")]

    def _segments(self, message: Message, is_continued: bool) -> list[Segment]:
        if message.role != "assistant":
            roles = {"system": self._system, "user": self._user, "tool": self._observation}
            return [(roles[message.role], "", message.content)]
        has_text = message.content or is_continued or not message.tool_calls
        calls = [(self._assistant, call.name, _call_as_code(call)) for call in message.tool_calls]
        return [(self._assistant, "", message.content), *calls] if has_text else calls


def _check_end(conversation: Conversation) -> None:
    if not conversation.messages:
        raise PromptError("The conversation must have at least one message.")
    ends_with_answer = conversation.messages[-1].role == "assistant"
    if conversation.continue_final and not ends_with_answer:
        raise PromptError("The last message must have the role assistant to be continued.")
    if conversation.continue_final and conversation.messages[-1].tool_calls:
        raise PromptError("The last message is a tool call, which cannot be continued.")
    if ends_with_answer and not conversation.continue_final:
        raise PromptError("The last message must have the role user, tool or system, not assistant.")


def _with_tool_prompt(messages: tuple[Message, ...], tools: tuple[Tool, ...]) -> tuple[Message, ...]:
    """Append the description of the tools to the first system message."""
    if not tools:
        return messages
    system, rest = "", messages
    if messages and messages[0].role == "system":
        system, rest = f"{messages[0].content}\n", messages[1:]
    listing = [
        {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)} for tool in tools
    ]
    described = json.dumps(listing, indent=4, ensure_ascii=False)
    return (Message("system", f"{system}{TOOL_PROMPT}\n{described}"), *rest)


def _call_as_code(call: ToolCall) -> str:
    """An earlier call as the model wrote it: a fenced Python call with keyword arguments, or with a string if its
    arguments are not a JSON object."""
    arguments = call.parsed_arguments
    if isinstance(arguments, str):
        inner = repr(arguments)
    elif all(name.isidentifier() and not keyword.iskeyword(name) for name in arguments):
        inner = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    else:
        inner = f"**{arguments!r}"
    return f"```python\ntool_call({inner})\n```"


def _import_checkpoint(source: Path, target: Path, options: Mapping[str, str], progress: Progress) -> dict[str, Any]:
    from models.checkpoints.files import has_role_tokens

    if has_role_tokens(source) is False:
        raise ImportRefused(
            f"the tokenizer in {source} writes ChatGLM2's [Round n] prompt: import it with the family chatglm2"
        )
    num_specials = NUM_SPECIALS + NUM_ROLES
    return import_checkpoint(source, target, options, progress, num_specials=num_specials, default_rope="base")


def open_format(folder: Path) -> ChatGLM3Format:
    return ChatGLM3Format(SentencePieceTokenizer(folder / TOKENIZER_FILE, NUM_SPECIALS + NUM_ROLES))


FAMILY = Family(
    name="chatglm3",
    title="ChatGLM3-6B, also -32k",
    import_checkpoint=_import_checkpoint,
    load=load_with(open_format),
    options=(ROPE, PREFIX),
    open_format=open_format,
)
