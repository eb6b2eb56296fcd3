"""ChatGLM-6B, the first version: conversations as [Round n] prompts, with its own tokenizer and its own network."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.precision import Precision, Progress
from models.families.answer_parsers import TrimmedAnswerParser, TrimmedAnswers
from models.families.chatglm2 import PREFIX, to_rounds
from models.families.chatglm_answer_parser import ChatGLMAnswerParser
from models.family import Family, LoadedNetwork
from models.tokenizers.chatglm import ChatGLMTokenizer
from serving.generation.interface import AnswerParser, Conversation, Language, ToolSyntax

if TYPE_CHECKING:
    import torch


class ChatGLMFormat(TrimmedAnswers[ChatGLMTokenizer]):
    """Conversation -> ids and back. The special tokens follow the text: [gMASK] <sop>, then the answer.

    gmask, sop, eop: ids of these tokens, shifted by the image tokens.
    """

    tool_syntax: ToolSyntax | None = None
    language: Language = "zh"

    def __init__(self, tokenizer: ChatGLMTokenizer, gmask: int, sop: int, eop: int) -> None:
        super().__init__(tokenizer)
        self._suffix = [gmask, sop]
        self.stop_token_ids = frozenset({eop})
        self.num_tokens = tokenizer.num_tokens

    def render(self, conversation: Conversation, context_length: int | None = None) -> list[int]:
        """The ids of the text, of the suffix and of the beginning of the answer."""
        question, answer = prompt_text(conversation)
        self._tokenizer.bound.check((question, answer), context_length, "messages")
        return self._tokenizer.encode(question) + self._suffix + self._tokenizer.encode(answer)

    def encode(self, text: str, context_length: int | None = None) -> list[int]:
        """The ids of the text and of the suffix, without which the network cannot answer."""
        self._tokenizer.bound.check((text,), context_length, "prompt")
        return self._tokenizer.encode(text, "prompt") + self._suffix

    def parser(self, begun: str = "") -> AnswerParser:
        return ChatGLMAnswerParser(TrimmedAnswerParser(bool(begun)), begun[-1:])


def prompt_text(conversation: Conversation) -> tuple[str, str]:
    """(the text before the suffix, the beginning of the answer). Raises PromptError, see `to_rounds`.

    A single question is the whole text; with history every turn gets `[Round n]`, counted from 0. A first system
    message is written directly before the last question, as in ChatGLM2's public server; v1's own had none.
    Source: chatglm-6b modeling_chatglm.py, chat.
    """
    system, messages = to_rounds(conversation)
    turns = [message.content for message in messages]
    start = turns.pop() if conversation.continue_final else ""
    *history, question = turns
    if not history:
        return system + question, start
    rounds = zip(history[::2], history[1::2], strict=True)
    text = "".join(f"[Round {i}]\n问：{asked}\n答：{answered}\n" for i, (asked, answered) in enumerate(rounds))
    return f"{text}[Round {len(history) // 2}]\n问：{system}{question}\n答：", start


def _import_checkpoint(source: Path, target: Path, options: Mapping[str, str], progress: Progress) -> dict[str, Any]:
    from models.checkpoints.chatglm import TOKENIZER_FILE, convert, find_num_image_tokens, read_config, write_config
    from models.checkpoints.chatglm_tensors import quantization_bits
    from models.checkpoints.files import read_json
    from models.checkpoints.ptuning import CacheShape, import_prefix

    original = read_json(source / "config.json")
    tokenizer_file = source / TOKENIZER_FILE
    config = read_config(original)
    num_image_tokens = find_num_image_tokens(tokenizer_file, config)
    config = replace(config, num_tokens=ChatGLMTokenizer(tokenizer_file, num_image_tokens).num_tokens)
    metadata = convert(source, target, config, quantization_bits(original), progress)
    write_config(target, config, num_image_tokens)
    shutil.copyfile(tokenizer_file, target / TOKENIZER_FILE)
    shape = CacheShape(config.num_layers, config.num_heads, config.hidden_size // config.num_heads)
    prefix = import_prefix(source, options.get("prefix"), target, shape, config.max_positions)
    return metadata | prefix | {"context_length": config.max_positions}


def _load(
    folder: Path, metadata: Mapping[str, Any], device: torch.device, precision: Precision, progress: Progress
) -> LoadedNetwork:
    from models.checkpoints.chatglm import TOKENIZER_FILE, load_network, read_stored_config
    from models.checkpoints.ptuning import load_prefix

    config, num_image_tokens = read_stored_config(folder)
    tokenizer = ChatGLMTokenizer(folder / TOKENIZER_FILE, num_image_tokens)
    chat_format = ChatGLMFormat(tokenizer, config.gmask_token_id, config.bos_token_id, config.eos_token_id)
    network = load_network(folder, config, device, precision, progress)
    return LoadedNetwork(network, chat_format, load_prefix(folder))


FAMILY = Family(
    name="chatglm",
    title="ChatGLM-6B (the first version), also -int4 and -int8",
    import_checkpoint=_import_checkpoint,
    load=_load,
    options=(PREFIX,),
)
