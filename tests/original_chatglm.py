"""Tiny random checkpoints in the original layout of ChatGLM-6B, the first version."""

from __future__ import annotations

import json
import random
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file

from models.checkpoints.chatglm import read_config, tensor_names
from models.networks.chatglm import ChatGLMNetwork
from models.tokenizers.chatglm import ChatGLMTokenizer


def train_tokenizer(file: Path) -> None:
    """A SentencePiece model with ChatGLM-6B's control and white-space tokens, small."""
    words = ["alpha", "beta", "gamma", "delta", "你好", "世界", "hello", "model"]
    chooser = random.Random(1)
    lines = [" ".join(chooser.choices(words, k=6)) for _ in range(400)]
    blanks = [f"<|blank_{length}|>" for length in range(2, 81)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(file.with_suffix("")),
        vocab_size=430,
        hard_vocab_limit=False,
        byte_fallback=True,
        control_symbols=["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"],
        user_defined_symbols=["<n>", "<|tab|>", *blanks],
        pad_id=3,
        minloglevel=2,
    )
    file.with_suffix(".vocab").unlink()


def write_checkpoint(folder: Path, num_image_tokens: int = 0, **overrides: object) -> dict[str, torch.Tensor]:
    """A tiny random ChatGLM-6B in its original layout. Returns its weights."""
    train_tokenizer(folder / "ice_text.model")
    tokenizer = ChatGLMTokenizer(folder / "ice_text.model", num_image_tokens)
    config: dict[str, object] = {
        "model_type": "chatglm",
        "position_encoding_2d": True,
        "hidden_size": 32,
        "inner_hidden_size": 48,
        "num_attention_heads": 2,
        "num_layers": 2,
        "max_sequence_length": 128,
        "layernorm_epsilon": 1e-5,
        "vocab_size": tokenizer.num_tokens + 6,
        "bos_token_id": tokenizer.special_id("<sop>"),
        "eos_token_id": tokenizer.special_id("<eop>"),
        "mask_token_id": tokenizer.special_id("[MASK]"),
        "gmask_token_id": tokenizer.special_id("[gMASK]"),
    }
    (folder / "config.json").write_text(json.dumps(config | overrides))
    network = read_config(config)
    generator = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ChatGLMNetwork(network).state_dict().items()}
    weights = {old: _random(old, shapes[new], generator) for old, new in tensor_names(network).items()}
    weights["lm_head.weight"] = torch.zeros(shapes["word_embeddings.weight"], dtype=torch.float16)
    save_file(weights, folder / "model.safetensors")
    return weights


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Half precision, sized so that layers outweigh the residual (times 7.5) and no bias outweighs the layers."""
    values = torch.randn(shape, generator=generator, dtype=torch.float32)
    if "layernorm" in name and name.endswith("weight"):
        return (1 + 0.1 * values).half()
    return (values * (0.05 if len(shape) == 1 else 1.0)).half()
