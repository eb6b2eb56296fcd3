"""ChatGLM2-6B: its checkpoint, its tokenizer and its [Round n] prompt. The network is transformers' GLM."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.precision import Precision, Progress
from models.families.answer_parsers import TrimmedAnswerParser
from models.family import Family, ImportOption, ImportRefused, LoadedNetwork
from models.tokenizers.sentencepiece import NUM_SPECIALS, SentencePieceTokenizer, open_for_import
from serving.generation.interface import (
    AnswerParser,
    ChatFormat,
    Conversation,
    Language,
    Message,
    PromptError,
    ToolSyntax,
)

if TYPE_CHECKING:
    import torch

    from models.checkpoints.chatglm2 import RopeRule

ROPE = ImportOption(
    name="rope",
    help="what rope_ratio of a long-context checkpoint does: divide the position (linear) or multiply the base (base)",
    choices=("linear", "base"),
)
TOKENIZER_FILE = "tokenizer.model"


def import_network(
    source: Path,
    target: Path,
    options: Mapping[str, str],
    progress: Progress,
    *,
    num_specials: int = NUM_SPECIALS,
    default_rope: RopeRule | None = None,
) -> dict[str, Any]:
    """What the three families on this network have in common: weights, tokenizer and metadata. Raises ImportRefused.

    What rope_ratio means is the person's choice, else what the checkpoint's own code says, else `default_rope`.
    A folder without a tokenizer gives a stored model that other programs can load and that this server refuses.
    """
    from models.checkpoints import chatglm2 as glm_checkpoint
    from models.checkpoints import shards as checkpoint

    network = glm_checkpoint.read_network(checkpoint.read_json(source / "config.json"))
    tokenizer_file = source / TOKENIZER_FILE
    has_tokenizer = tokenizer_file.is_file()
    if has_tokenizer:
        checkpoint.refuse_pointer(tokenizer_file)
        open_for_import(tokenizer_file, num_specials, network.vocab_size)
    rules: dict[str, RopeRule] = {"linear": "linear", "base": "base"}
    rope = rules.get(options.get("rope", "")) or glm_checkpoint.rope_rule_in_code(source) or default_rope
    metadata = glm_checkpoint.convert(source, target, rope, progress)
    if has_tokenizer:
        shutil.copyfile(tokenizer_file, target / TOKENIZER_FILE)
    return {**metadata, "weights_only": not has_tokenizer}


def load_network(
    folder: Path,
    metadata: Mapping[str, Any],
    device: torch.device,
    precision: Precision,
    progress: Progress,
    chat_format: ChatFormat,
) -> LoadedNetwork:
    """Open what `import_network` wrote."""
    from models.networks.transformers_decoder import open_decoder

    network = open_decoder(
        folder, device, precision, progress, chat_format.num_tokens, max_positions=int(metadata["context_length"])
    )
    return LoadedNetwork(network, chat_format)


def mentions_roles(source: Path) -> bool | None:
    """Whether the checkpoint's own tokenizer has ChatGLM3's role tokens; None if the folder does not say."""
    texts = [
        (source / name).read_text(encoding="utf-8", errors="replace")
        for name in ("tokenization_chatglm.py", "tokenizer_config.json")
        if (source / name).is_file()
    ]
    if any("<|user|>" in text for text in texts):
        return True
    return False if any("[Round {}]" in text for text in texts) else None


class ChatGLM2Format:
    """Conversation -> ids and back. No text of a user can become a special token: specials are added as ids."""

    tool_syntax: ToolSyntax | None = None
    language: Language = "zh"

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._tokenizer = tokenizer
        self.stop_token_ids = frozenset({tokenizer.eos})
        self.num_tokens = tokenizer.num_tokens

    def render(self, conversation: Conversation) -> list[int]:
        return self._with_prefix(round_prompt(conversation), "messages")

    def encode(self, text: str) -> list[int]:
        return self._with_prefix(text, "prompt")

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def parser(self, begun: str = "") -> AnswerParser:
        return TrimmedAnswerParser(bool(begun))

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def _with_prefix(self, text: str, param: str) -> list[int]:
        return [self._tokenizer.gmask, self._tokenizer.sop, *self._tokenizer.encode(text, param)]


def round_prompt(conversation: Conversation) -> str:
    """The conversation as ChatGLM2 was trained to read it, one string. Raises PromptError for what does not fit.

    `[Round n]`, the question and the answer, counted from 1. A first system message stands directly before the last
    question, as in the public openai_api.py; where that server silently dropped history, this refuses.
    Source: tokenization_chatglm.py, build_prompt.
    """
    system, turns = check_rounds(conversation)
    last_question = len(turns) - (2 if conversation.continue_final else 1)
    parts: list[str] = []
    for i, message in enumerate(turns):
        if message.role == "user":
            opening = system if i == last_question else ""
            parts.append(f"[Round {i // 2 + 1}]\n\n问：{opening}{message.content}\n\n答：")
        else:
            parts.append(message.content if i == len(turns) - 1 else f"{message.content}\n\n")
    return "".join(parts)


def check_rounds(conversation: Conversation) -> tuple[str, tuple[Message, ...]]:
    """(system message, or '', and the questions and answers in turn, the last waiting for its answer).

    Raises PromptError for what is not such a conversation.
    """
    if conversation.tools:
        raise PromptError("This model was not trained to call tools.", "tools")
    messages = conversation.messages
    has_system = bool(messages) and messages[0].role == "system"
    system, turns = (messages[0].content, messages[1:]) if has_system else ("", messages)
    _check_turns(turns, len(messages) - len(turns), conversation.continue_final)
    return system, turns


def _check_turns(turns: Sequence[Message], offset: int, continue_final: bool) -> None:
    """Alternating roles. `offset`: index of the first turn in the request."""
    for i, message in enumerate(turns):
        where = f"messages[{offset + i}]"
        if message.role == "tool" or message.tool_calls:
            raise PromptError(f"This model was not trained to call tools, but {where} holds a tool call or its result.")
        if message.role == "system":
            raise PromptError(f"This model takes one system message, as the first message; {where} is another.")
        expected = "user" if i % 2 == 0 else "assistant"
        if message.role != expected:
            raise PromptError(
                "This model's conversations alternate between user and assistant, beginning with user: "
                f"{where} has the role {message.role} where {expected} is expected."
            )
    last = "assistant" if continue_final else "user"
    if not turns or turns[-1].role != last:
        raise PromptError(f"The last message must have the role {last}.")


def _import_checkpoint(source: Path, target: Path, options: Mapping[str, str], progress: Progress) -> dict[str, Any]:
    if mentions_roles(source):
        raise ImportRefused(
            f"the tokenizer in {source} has ChatGLM3's role tokens (<|user|> …): import it with the family chatglm3"
        )
    return import_network(source, target, options, progress)


def open_format(folder: Path) -> ChatGLM2Format:
    return ChatGLM2Format(SentencePieceTokenizer(folder / TOKENIZER_FILE))


def _load(
    folder: Path, metadata: Mapping[str, Any], device: torch.device, precision: Precision, progress: Progress
) -> LoadedNetwork:
    return load_network(folder, metadata, device, precision, progress, open_format(folder))


FAMILY = Family(
    name="chatglm2",
    title="ChatGLM2-6B, also -32k, -int4 and int8",
    import_checkpoint=_import_checkpoint,
    load=_load,
    options=(ROPE,),
    open_format=open_format,
)
