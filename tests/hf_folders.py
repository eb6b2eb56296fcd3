"""Tiny random Hugging Face models in their publishers' layout. Imports nothing of this project."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHATML = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Answer with <tool_call>{...}</tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('No system messages.') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GLM = "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
LINES = [
    "Hello there, how are you? I'm fine.",
    "def f(x):\n    return x ** 2",
    "你好，世界！很高兴。",
    "naïve café 🙂",
] * 5


def byte_level_tokenizer(special: list[str], markup: list[str]) -> Tokenizer:
    """The kind of tokenizer of Qwen, Llama 3 and GLM-4."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in markup])
    return tokenizer


def piece_tokenizer() -> Tokenizer:
    """The kind of Llama 1 and 2: ▁ for spaces, byte tokens for unknown characters, a space in front of every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    trained = json.loads(tokenizer.to_str())
    trained["added_tokens"] = [token for token in trained["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, template: str | None, **named: str) -> PreTrainedTokenizerFast:
    """Save a tokenizer beside the model; return it as transformers loads it."""
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)
    wrapped.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def llama(vocab_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **SIZES, bos_token_id=1, eos_token_id=2))


def mistral(vocab_size: int) -> MistralForCausalLM:
    """Its window is shorter than any prompt."""
    config = MistralConfig(vocab_size=vocab_size, **SIZES, bos_token_id=1, eos_token_id=2, sliding_window=8)
    return MistralForCausalLM(config)


def qwen3(vocab_size: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab_size, **SIZES, head_dim=16, tie_word_embeddings=True, eos_token_id=vocab_size - 1
    )
    return Qwen3ForCausalLM(config)


def glm(vocab_size: int) -> GlmForCausalLM:
    return GlmForCausalLM(GlmConfig(vocab_size=vocab_size, **SIZES, head_dim=8, bos_token_id=1, eos_token_id=[2, 3]))


def glm4(vocab_size: int) -> Glm4ForCausalLM:
    """GLM-4-0414, which has two more norms a layer, with a long-context base."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0 * 50, "partial_rotary_factor": 0.5}
    config = Glm4Config(vocab_size=vocab_size, **SIZES, head_dim=8, eos_token_id=[2, 3], rope_parameters=rope)
    return Glm4ForCausalLM(config)


def write_folder(folder: Path, kind: str) -> PreTrainedTokenizerFast:
    """A tiny random model in its publisher's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(5)
    builders: dict[str, Callable[[int], Any]] = {
        "llama": llama, "mistral": mistral, "qwen3": qwen3, "glm": glm, "glm4": glm4
    }  # fmt: skip
    if kind in ("llama", "mistral"):
        tokenizer, template, named = piece_tokenizer(), LLAMA, {"bos_token": "<s>", "eos_token": "</s>"}
    elif kind == "qwen3":
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokenizer = byte_level_tokenizer(special, ["<tool_call>", "</tool_call>"])
        template, named = CHATML, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    else:
        tokenizer = byte_level_tokenizer(["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|endoftext|>"], [])
        template, named = GLM, {"eos_token": "<|endoftext|>"}
    model = builders[kind](tokenizer.get_vocab_size())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return write_tokenizer(folder, tokenizer, template, **named)


def write_llama_style_pieces(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """tokenizer.model and its configuration without a tokenizer.json, as published for WizardLM-13B."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in LINES * 20 for line in line.split("\n")]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    configuration = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": pieces.get_piece_size()}))
    return pieces
