"""Checkpoints in ChatGLM2's original layout and a reference network. Imports nothing of this project."""

from __future__ import annotations

import functools
import io
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

SMALL: dict[str, Any] = {
    "model_type": "chatglm",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "ffn_hidden_size": 48,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "original_rope": True,
    "padded_vocab_size": 448,
    "seq_length": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Every tensor of the original network, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.15, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std + mean

    hidden, vocab, ffn = config["hidden_size"], config["padded_vocab_size"], config["ffn_hidden_size"]
    heads = config["num_attention_heads"] * config["kv_channels"]
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else config["num_attention_heads"]
    qkv = heads + 2 * groups * config["kv_channels"]
    weights = {
        "transformer.embedding.word_embeddings.weight": normal(vocab, hidden, std=1.0),
        "transformer.rotary_pos_emb.inv_freq": torch.ones(config["kv_channels"] // 4),
        "transformer.encoder.final_layernorm.weight": normal(hidden, mean=1.0),
        "transformer.output_layer.weight": normal(vocab, hidden),
    }
    for i in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{i}"
        weights |= {
            f"{layer}.input_layernorm.weight": normal(hidden, mean=1.0),
            f"{layer}.self_attention.query_key_value.weight": normal(qkv, hidden),
            f"{layer}.self_attention.dense.weight": normal(hidden, heads),
            f"{layer}.post_attention_layernorm.weight": normal(hidden, mean=1.0),
            f"{layer}.mlp.dense_h_to_4h.weight": normal(2 * ffn, hidden),
            f"{layer}.mlp.dense_4h_to_h.weight": normal(hidden, ffn),
        }
        if config["add_qkv_bias"]:
            weights[f"{layer}.self_attention.query_key_value.bias"] = normal(qkv)
    return weights


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    shards: int = 1,
    suffix: str = "safetensors",
) -> None:
    """Write config.json and the weights, in `shards` files with an index if there are several, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer())
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, weight_map = list(weights), dict[str, str]()
    for i in range(shards):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: weights[name] for name in names[i::shards]}
        weight_map |= dict.fromkeys(part, file)
        if suffix == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@functools.cache
def tiny_tokenizer(add_dummy_prefix: bool = True) -> bytes:
    """A SentencePiece model of 400 pieces with ChatGLM2's settings; CodeGeeX2's has no dummy prefix."""
    words = [
        "你好",
        "世界",
        "hello",
        "world",
        "tool",
        "call",
        "system",
        "sop",
        "[Round",
        "问：",
        "答：",
        "天气",
        "def",
        "people",
    ]
    generator = random.Random(3)
    sentences = [" ".join(generator.choices(words, k=6)) + str(generator.random()) for _ in range(500)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=out,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=add_dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def reference_logits(config: Mapping[str, Any], weights: Mapping[str, Tensor], ids: Tensor, rope: str) -> Tensor:
    """The original network in float64, written from its description. ids: [rows] -> [rows, vocab].

    rope: 'linear' divides the position by rope_ratio, 'base' multiplies the base.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, width = config["num_attention_heads"], config["kv_channels"]
    grouped = config["multi_query_attention"]
    groups = config["multi_query_group_num"] if grouped else heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["layernorm_epsilon"]).sqrt() * w[f"{name}.weight"]

    ratio, channels = config.get("rope_ratio", 1), width // 2
    base = 10_000.0 * (ratio if rope == "base" else 1)
    positions = torch.arange(len(ids)).double() / (ratio if rope == "linear" else 1)
    angles = positions[:, None] / base ** (torch.arange(0, channels, 2).double() / channels)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotate(x: Tensor) -> Tensor:  # [rows, heads, width]: neighbours of the first half are complex numbers
        pairs = torch.view_as_complex(x[..., :channels].reshape(*x.shape[:2], -1, 2).contiguous())
        return torch.cat((torch.view_as_real(pairs * turn).flatten(2), x[..., channels:]), -1)

    x = w["transformer.embedding.word_embeddings.weight"][ids]
    for i in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{i}"
        qkv = norm(x, f"{layer}.input_layernorm") @ w[f"{layer}.self_attention.query_key_value.weight"].T
        qkv = qkv + w.get(f"{layer}.self_attention.query_key_value.bias", torch.zeros(1))
        if grouped:
            q, k, v = qkv.split((heads * width, groups * width, groups * width), dim=-1)
            q, k, v = q.unflatten(1, (heads, width)), k.unflatten(1, (groups, width)), v.unflatten(1, (groups, width))
        else:
            q, k, v = qkv.unflatten(1, (heads, 3 * width)).split(width, dim=-1)
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (rotate(k), v))
        scores = torch.einsum("qhd,khd->hqk", rotate(q), k) / width**0.5
        scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf)
        seen = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + seen @ w[f"{layer}.self_attention.dense.weight"].T
        up = norm(x, f"{layer}.post_attention_layernorm") @ w[f"{layer}.mlp.dense_h_to_4h.weight"].T
        gate, up = up.chunk(2, dim=-1)
        x = x + (torch.nn.functional.silu(gate) * up) @ w[f"{layer}.mlp.dense_4h_to_h.weight"].T
    return norm(x, "transformer.encoder.final_layernorm") @ w["transformer.output_layer.weight"].T
