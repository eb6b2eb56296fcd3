"""One tiny checkpoint of each family in its publisher's layout, with reference prompt ids and greedy tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from models.families import chatglm, glm4
from models.store.progress import no_progress
from tests import hf_folders, original_chatglm, original_glm
from tests.golden_data import GOLDEN
from tests.reference_attention import greedy

Ids = Sequence[int]
VICUNA = (
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {} ASSISTANT:"
)
SHARPER = 3.0  # so that the answer depends on every token of a prompt and its position


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk, and the ids and tokens of the original code."""

    folder: Path
    chat_ids: Callable[[str], list[int]]  # of one question
    raw_ids: Callable[[str], list[int]]  # of a raw completion's prompt
    greedy: Callable[[Ids, int], list[int]]  # prompt, number of tokens; end tokens are tokens like others
    num_tokens: int  # ids that have a text
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    family: str = "hf"


def _glm(folder: Path, family: str, num_roles: int, dummy_prefix: bool, **config: object) -> Written:
    settings: dict[str, Any] = original_glm.SMALL | {"kv_channels": 16} | config
    weights = original_glm.random_weights(settings, seed=7)
    for name in weights:
        if ".layers." in name and weights[name].ndim == 2:
            weights[name] *= SHARPER
    original_glm.write_checkpoint(folder, settings, weights, shards=2, suffix="bin")
    (folder / "tokenizer.model").write_bytes(original_glm.tiny_tokenizer(dummy_prefix))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    size: int = pieces.get_piece_size()
    prefix, num_tokens = [size + 1, size + 3], size + 5 + num_roles

    def encode(text: str) -> list[int]:
        ids: list[int] = pieces.encode(text)
        return ids

    def chat_ids(question: str) -> list[int]:
        if num_roles:
            return [*prefix, size + 6, *encode("\n"), *encode(question), size + 7]
        return [*prefix, *encode(f"[Round 1]\n\n问：{question}\n\n答：")]

    def continuation(prompt: Ids, length: int) -> list[int]:
        ids = list(prompt)
        for _ in range(length):
            logits = original_glm.reference_logits(settings, weights, torch.tensor(ids), "base")[-1, :num_tokens]
            ids.append(int(logits.argmax()))
        return ids[len(prompt) :]

    return Written(folder, chat_ids, lambda text: [*prefix, *encode(text)], continuation, num_tokens, {}, family)


def _chatglm(folder: Path) -> Written:
    folder.mkdir()
    original_chatglm.write_checkpoint(folder)
    stored = folder.parent / "reference"
    stored.mkdir()
    metadata = chatglm.FAMILY.import_checkpoint(folder, stored, {}, no_progress)
    network = chatglm.FAMILY.load(stored, metadata, torch.device("cpu"), "float32", no_progress).network
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "ice_text.model"))
    suffix = [pieces.piece_to_id("[gMASK]"), pieces.piece_to_id("<sop>")]

    def with_suffix(text: str) -> list[int]:
        return [*pieces.encode(text), *suffix]

    def continuation(prompt: Ids, length: int) -> list[int]:
        padding = frozenset(range(network.shape.num_tokens, network.shape.vocab_size))
        return greedy(network, [list(prompt)], length, padding)[0]

    return Written(folder, with_suffix, with_suffix, continuation, network.shape.num_tokens, {}, "chatglm")


def _hf(folder: Path, kind: str, template: str = "") -> Written:
    tokenizer = hf_folders.write_folder(folder, kind)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 1.0
        elif ".layers." in name and parameter.ndim == 2:
            parameter.data *= SHARPER
    model.save_pretrained(folder)
    if template:
        (folder / "chat_template.jinja").unlink()

    def chat_ids(question: str) -> list[int]:
        if template:
            return list(tokenizer.encode(VICUNA.format(question), add_special_tokens=False))
        message = {"role": "user", "content": question}
        return list(tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False))

    def continuation(prompt: Ids, length: int) -> list[int]:
        made = model.generate(
            torch.tensor([prompt]), max_new_tokens=length, min_new_tokens=length, do_sample=False, eos_token_id=None
        )
        ids: list[int] = made[0, len(prompt) :].tolist()
        return ids

    options = {"template": template} if template else {}
    return Written(folder, chat_ids, lambda text: list(tokenizer.encode(text)), continuation, len(tokenizer), options)


def _glm4(folder: Path) -> Written:
    """The golden checkpoint; its tokens and logits are compared with the original's in tests/golden/test_glm4.py."""
    shutil.copytree(GOLDEN / "finetune" / "glm4-tiny", folder, copy_function=shutil.copyfile)
    stored = folder.parent / "reference"
    stored.mkdir()
    glm4.FAMILY.import_checkpoint(folder, stored, {}, no_progress)
    model: Any = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(stored / "tokenizer.json"))
    num_tokens = 334  # behind the ranks and the control tokens come rows without a token

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def continuation(prompt: Ids, length: int) -> list[int]:
        ids = list(prompt)
        for _ in range(length):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1, :num_tokens].argmax()))
        return ids[len(prompt) :]

    def chat_ids(question: str) -> list[int]:
        return [322, 324, 327, *encode(f"\n{question}"), 328]

    return Written(folder, chat_ids, lambda text: [322, 324, *encode(text)], continuation, num_tokens, {}, "glm4")


FAMILIES: dict[str, Callable[[Path], Written]] = {
    "glm4-original": _glm4,
    "chatglm2": lambda folder: _glm(folder, "chatglm2", 0, True),
    "chatglm3": lambda folder: _glm(folder, "chatglm3", 4, True),
    "chatglm3-32k": lambda folder: _glm(folder, "chatglm3", 4, True, rope_ratio=50),
    "codegeex2": lambda folder: _glm(folder, "codegeex2", 0, False),
    "chatglm": _chatglm,
    "llama": lambda folder: _hf(folder, "llama"),
    "qwen3": lambda folder: _hf(folder, "qwen3"),
    "mistral": lambda folder: _hf(folder, "mistral"),
    "glm": lambda folder: _hf(folder, "glm"),
    "glm4": lambda folder: _hf(folder, "glm4"),
    "vicuna": lambda folder: _hf(folder, "llama", "vicuna"),
}
