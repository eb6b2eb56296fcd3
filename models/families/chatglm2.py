"""ChatGLM2-6B: conversations as [Round n] prompts. The network is transformers' GLM."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.precision import Progress
from models.families.answer_parsers import TrimmedAnswers
from models.families.decoder import load_with
from models.family import Family, ImportOption, ImportRefused
from models.tokenizers.sentencepiece import NUM_SPECIALS, SentencePieceTokenizer, open_for_import
from serving.generation.interface import Conversation, Language, Message, PromptError, Role, ToolSyntax

if TYPE_CHECKING:
    from models.checkpoints.chatglm2 import RopeRule

ROPE = ImportOption(
    name="rope",
    help="what rope_ratio of a long-context checkpoint does: divide the position (linear) or multiply the base (base)",
    choices=("linear", "base"),
)
PREFIX = ImportOption(name="prefix", help="the folder of a P-Tuning v2 prefix (checkpoint-N) trained on this model")
TOKENIZER_FILE = "tokenizer.model"


def import_checkpoint(
    source: Path,
    target: Path,
    options: Mapping[str, str],
    progress: Progress,
    *,
    num_specials: int = NUM_SPECIALS,
    default_rope: RopeRule | None = None,
) -> dict[str, Any]:
    """Import weights and tokenizer, as `Family.import_checkpoint`, of every family with ChatGLM2's network.

    What rope_ratio means is the operator's choice, else what the checkpoint's own code says, else `default_rope`.
    A folder without a tokenizer gives a stored model that other programs can load and that this server refuses.
    """
    from models.checkpoints.chatglm2 import convert, read_config, rope_rule_in_code
    from models.checkpoints.files import read_json, refuse_lfs_pointer
    from models.checkpoints.ptuning import CacheShape, import_prefix

    config = read_config(read_json(source / "config.json"))
    tokenizer_file = source / TOKENIZER_FILE
    has_tokenizer = tokenizer_file.is_file()
    if has_tokenizer:
        refuse_lfs_pointer(tokenizer_file)
        open_for_import(tokenizer_file, num_specials, config.vocab_size)
    rules: dict[str, RopeRule] = {"linear": "linear", "base": "base"}
    rope = rules.get(options.get("rope", "")) or rope_rule_in_code(source) or default_rope
    metadata = convert(source, target, rope, progress)
    shape = CacheShape(config.num_layers, config.num_kv_heads, config.head_dim)
    metadata |= import_prefix(source, options.get("prefix"), target, shape, config.max_positions)
    if has_tokenizer:
        shutil.copyfile(tokenizer_file, target / TOKENIZER_FILE)
    return {**metadata, "weights_only": not has_tokenizer}


class ChatGLM2Format(TrimmedAnswers[SentencePieceTokenizer]):
    """Conversation -> ids and back. Special tokens are added as ids, so no text of a user can become one."""

    tool_syntax: ToolSyntax | None = None
    language: Language = "zh"

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        super().__init__(tokenizer)
        self.stop_token_ids = frozenset({tokenizer.eos})
        self.num_tokens = tokenizer.num_tokens

    def render(self, conversation: Conversation, context_length: int | None = None) -> list[int]:
        return self._with_prefix(round_prompt(conversation), "messages", context_length)

    def encode(self, text: str, context_length: int | None = None) -> list[int]:
        return self._with_prefix(text, "prompt", context_length)

    def _with_prefix(self, text: str, param: str, context_length: int | None) -> list[int]:
        self._tokenizer.bound.check((text,), context_length, param)
        return [self._tokenizer.gmask, self._tokenizer.sop, *self._tokenizer.encode(text, param)]


def round_prompt(conversation: Conversation) -> str:
    """The conversation as one string, as ChatGLM2 was trained. Raises PromptError, see `to_rounds`.

    `[Round n]`, the question and the answer, counted from 1. The system message is written directly before the last
    question, as in the public openai_api.py; where that server silently dropped history, this raises.
    Source: tokenization_chatglm.py, build_prompt.
    """
    system, turns = to_rounds(conversation)
    last_question = len(turns) - (2 if conversation.continue_final else 1)
    parts: list[str] = []
    for i, message in enumerate(turns):
        if message.role == "user":
            opening = system if i == last_question else ""
            parts.append(f"[Round {i // 2 + 1}]\n\n问：{opening}{message.content}\n\n答：")
        else:
            parts.append(message.content if i == len(turns) - 1 else f"{message.content}\n\n")
    return "".join(parts)


def to_rounds(conversation: Conversation) -> tuple[str, list[Message]]:
    """(the system message or '', questions and answers in turn, up to the message to answer or to continue).

    The format takes one system message, and questions and answers alternate in it. System messages in front
    are joined by a blank line, a later one is part of the question, messages of one role by a line break; an answer in
    front answers an empty question. Raises PromptError for tools, and without a message to answer or to continue.
    """
    if conversation.tools:
        raise PromptError("This model was not trained to call tools.", "tools")
    messages = conversation.messages
    num_system = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    turns: list[Message] = []
    for i, message in enumerate(messages[num_system:], num_system):
        if message.role == "tool" or message.tool_calls:
            where = message.source or f"messages[{i}]"
            raise PromptError(f"This model was not trained to call tools, but {where} holds a tool call or its result.")
        role: Role = "assistant" if message.role == "assistant" else "user"
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}\n{message.content}")
        else:
            turns.append(Message(role, message.content))
    last = "assistant" if conversation.continue_final else "user"
    if not turns or messages[-1].role == "system" or turns[-1].role != last:
        raise PromptError(f"The last message must have the role {last}.")
    if turns[0].role == "assistant":
        turns.insert(0, Message("user", ""))
    return "\n\n".join(message.content for message in messages[:num_system]), turns


def _import_checkpoint(source: Path, target: Path, options: Mapping[str, str], progress: Progress) -> dict[str, Any]:
    from models.checkpoints.files import has_role_tokens

    if has_role_tokens(source):
        raise ImportRefused(
            f"the tokenizer in {source} has ChatGLM3's role tokens (<|user|> …): import it with the family chatglm3"
        )
    return import_checkpoint(source, target, options, progress)


def open_format(folder: Path) -> ChatGLM2Format:
    return ChatGLM2Format(SentencePieceTokenizer(folder / TOKENIZER_FILE))


FAMILY = Family(
    name="chatglm2",
    title="ChatGLM2-6B, also -32k, -int4 and int8",
    import_checkpoint=_import_checkpoint,
    load=load_with(open_format),
    options=(ROPE, PREFIX),
    open_format=open_format,
)
