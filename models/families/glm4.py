"""GLM-4-9B-chat in its original layout: role tokens, observations, tool calls. Weights are ChatGLM2's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.precision import Progress
from models.families.answer_parsers import TrimmedAnswers
from models.families.decoder import load_with
from models.family import Family, ImportRefused
from serving.generation.interface import Conversation, Language, Message, PromptError, Tool, ToolSyntax

if TYPE_CHECKING:
    from models.tokenizers.tokenizer_json import FastTokenizer, PromptPiece

TOKENIZER_FILE = "tokenizer.json"
PREFIX = ("[gMASK]", "<sop>")
STOP = ("<|endoftext|>", "<|user|>", "<|observation|>")
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "tool": "<|observation|>"}
# as trained: the system prompt of the model's own chat template, with a section for each function
TOOL_PROMPT = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
TOOL_NOTE = "在调用上述函数时，请使用 Json 格式表示调用的参数。"
CALL = ToolSyntax("{name}\n", "", "", is_at_start=True)


class GLM4Format(TrimmedAnswers["FastTokenizer"]):
    """Conversation -> ids and back. Control tokens are never read from a text of a user.

    Source: chat_template of glm-4-9b-chat's tokenizer_config.json; messages without content are left out there too.
    """

    tool_syntax: ToolSyntax | None = CALL
    language: Language = "zh"

    def __init__(self, tokenizer: FastTokenizer, num_rows: int) -> None:
        """num_rows: of the network's embedding."""
        super().__init__(tokenizer)
        self.stop_token_ids = frozenset(i for name in STOP if (i := tokenizer.id_of(name)) is not None)
        self.num_tokens = min(tokenizer.num_tokens, num_rows)

    def render(self, conversation: Conversation, context_length: int | None = None) -> list[int]:
        pieces = [_control(name) for name in PREFIX]
        if conversation.tools:
            pieces += _segment("system", _tool_prompt(conversation.tools))
        messages = conversation.messages
        _check_end(messages, conversation.continue_final)
        for message in messages:
            if message.content:
                pieces += _segment(message.role, f"\n{message.content}")
            for call in message.tool_calls:
                pieces += _segment("assistant", f"{call.name}\n{call.arguments or '{}'}")
        if not conversation.continue_final:
            pieces.append(_control(ROLES["assistant"]))
        return self._tokenizer.encode(pieces, "messages", context_length)

    def encode(self, text: str, context_length: int | None = None) -> list[int]:
        return self._tokenizer.encode_plain(text, context_length)


def _control(name: str) -> PromptPiece:
    from models.tokenizers.tokenizer_json import PromptPiece

    return PromptPiece(name, True)


def _segment(role: str, text: str) -> list[PromptPiece]:
    from models.tokenizers.tokenizer_json import PromptPiece

    return [PromptPiece(ROLES[role], True), PromptPiece(text, False)]


def _tool_prompt(tools: Sequence[Tool]) -> str:
    parts = [f"\n{TOOL_PROMPT}"]
    for tool in tools:
        function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
        described = json.dumps(function, indent=4, ensure_ascii=False)
        parts.append(f"\n## {tool.name}\n\n{described}\n{TOOL_NOTE}")
    return "".join(parts)


def _check_end(messages: Sequence[Message], continue_final: bool) -> None:
    if not messages:
        raise PromptError("The conversation must have at least one message.")
    if continue_final and (messages[-1].role != "assistant" or messages[-1].tool_calls or not messages[-1].content):
        raise PromptError("Only an assistant's message with text can be continued.")


def _specials(source: Path) -> dict[str, int]:
    """The control tokens of tokenizer_config.json. Raises ImportRefused if one that the prompt needs is missing."""
    from models.checkpoints.files import read_json

    listed = read_json(source / "tokenizer_config.json").get("added_tokens_decoder") or {}
    found = {str(token["content"]): int(number) for number, token in listed.items()}
    lacking = [name for name in (*PREFIX, *STOP, *ROLES.values()) if name not in found]
    if lacking:
        raise ImportRefused(f"tokenizer_config.json lacks the control token {lacking[0]}: it belongs to another model")
    return found


def _import_checkpoint(source: Path, target: Path, options: Mapping[str, str], progress: Progress) -> dict[str, Any]:
    from models.checkpoints.chatglm2 import convert, read_config
    from models.checkpoints.files import read_json, refuse_lfs_pointer, write_json
    from models.tokenizers import ranks_to_json

    config = read_config(read_json(source / "config.json"))
    original = source / "tokenizer.model"
    if not original.is_file():
        raise ImportRefused(f"{source} has no tokenizer.model: take it from the base model (--tokenizer DIR)")
    refuse_lfs_pointer(original)
    specials = _specials(source)
    if max(specials.values()) >= config.vocab_size:
        raise ImportRefused(f"the tokenizer has more ids than the network has rows ({config.vocab_size})")
    ranks_to_json.convert(original, target / TOKENIZER_FILE, specials, PREFIX)
    metadata = convert(source, target, "base", progress)
    stored = read_json(target / "config.json")
    ends = {"eos_token_id": [specials[name] for name in STOP], "pad_token_id": specials[STOP[0]], "bos_token_id": None}
    write_json(target / "config.json", stored | ends)
    return metadata


def open_format(folder: Path) -> GLM4Format:
    from models.checkpoints.files import read_json
    from models.tokenizers.tokenizer_json import FastTokenizer

    return GLM4Format(FastTokenizer(folder / TOKENIZER_FILE), int(read_json(folder / "config.json")["vocab_size"]))


FAMILY = Family(
    name="glm4",
    title="GLM-4-9B-chat in its original layout, also -1m",
    import_checkpoint=_import_checkpoint,
    load=load_with(open_format),
    open_format=open_format,
)
