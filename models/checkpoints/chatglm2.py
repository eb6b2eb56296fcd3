"""Turns a checkpoint of ChatGLM2's network into one of transformers' GLM. Knows names and shapes, no prompts.

ChatGLM2, ChatGLM3 and CodeGeeX2 share the network, and it is the one that transformers calls `glm`; only the names
differ, and query, key and value are one matrix. Source: modeling_chatglm.py of the three, compared by running both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.precision import Progress
from models.checkpoints import shards as checkpoint
from models.checkpoints.chatglm_quantized import packed_shape, read_weights
from models.checkpoints.shards import TensorInfo
from models.family import ImportRefused

RopeRule = Literal["linear", "base"]

ROTARY_BASE = 10_000.0
ROTARY_PART = 0.5  # of each head's channels
DROPPED = ("transformer.rotary_pos_emb.inv_freq", "rotary_pos_emb.inv_freq")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# flag, what the original takes when it is absent, the only value that the GLM network can stand for, and what it means
FLAGS: tuple[tuple[str, object, object, str], ...] = (
    ("rmsnorm", True, True, "LayerNorm in place of RMSNorm"),
    ("apply_residual_connection_post_layernorm", False, False, "residuals taken after the norm"),
    ("post_layer_norm", True, True, "no final norm"),
    ("add_bias_linear", False, False, "biases in the dense layers"),
    ("fp32_residual_connection", False, False, "residuals in another precision"),
    ("original_rope", True, True, "another rotary embedding"),
    ("rotary_percent", 0.5, 0.5, "another rotary part"),
    ("interleaved_qkv", False, False, "another order of query, key and value"),
    ("tie_word_embeddings", False, False, "an output layer tied to the embedding"),
)
FOREIGN = (
    ("position_encoding_2d", "ChatGLM-6B (the first version): import it with the family chatglm"),
    ("inner_hidden_size", "ChatGLM-6B (the first version): import it with the family chatglm"),
    ("vision_config", "a GLM-4V checkpoint, which takes images: it cannot be imported"),
    ("pre_seq_len", "a P-Tuning checkpoint with a prefix encoder: import the model it was tuned from, or merge it"),
)


@dataclass(frozen=True)
class Network:
    """The numbers of one ChatGLM2 network, checked."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int  # padded
    max_positions: int
    norm_epsilon: float
    has_qkv_bias: bool
    is_multi_query: bool
    bits: int  # 0: not quantised
    rope_ratio: float


@dataclass(frozen=True)
class Piece:
    """One original tensor: the shape that it must have, and what becomes of it."""

    shape: tuple[int, ...]
    split: Callable[[Tensor], Iterator[tuple[str, Tensor]]]
    is_quantized: bool = False


def read_network(config: Mapping[str, Any]) -> Network:
    """Check `config.json` of a checkpoint. Raises ImportRefused for what the GLM network cannot compute."""
    if config.get("model_type") != "chatglm":
        raise ImportRefused(
            f"config.json says model_type {config.get('model_type')!r}, not 'chatglm': "
            "choose the family that fits (hf for models that transformers knows)"
        )
    for name, what in FOREIGN:
        if config.get(name) not in (None, False):
            raise ImportRefused(f"config.json has {name!r}: this is {what}")
    for name, default, supported, meaning in FLAGS:
        if config.get(name, default) != supported:
            raise ImportRefused(f"config.json says {name}={config[name]!r} ({meaning}), which is not supported")
    bits = config.get("quantization_bit") or 0
    if bits not in (0, 4, 8):
        raise ImportRefused(f"config.json says quantization_bit={bits!r}; only 4, 8 and unquantised can be imported")
    num_heads, multi_query = (
        checkpoint.count(config, "num_attention_heads"),
        bool(config.get("multi_query_attention", False)),
    )
    num_kv_heads = checkpoint.count(config, "multi_query_group_num") if multi_query else num_heads
    if num_heads % num_kv_heads:
        raise ImportRefused(
            f"config.json has {num_heads} attention heads in {num_kv_heads} groups, which does not divide"
        )
    return Network(
        num_layers=checkpoint.count(config, "num_layers"),
        hidden_size=checkpoint.count(config, "hidden_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=checkpoint.count(config, "kv_channels"),
        intermediate_size=checkpoint.count(config, "ffn_hidden_size"),
        vocab_size=checkpoint.count(config, "padded_vocab_size"),
        max_positions=checkpoint.count(config, "seq_length"),
        norm_epsilon=_positive(config, "layernorm_epsilon", 1e-5),
        has_qkv_bias=bool(config.get("add_qkv_bias", False)),
        is_multi_query=multi_query,
        bits=bits,
        rope_ratio=_positive(config, "rope_ratio", 1.0),
    )


def _positive(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ImportRefused(f"config.json has no usable {name!r} ({value!r}); it must be a positive number")
    return float(value)


def rope_rule_in_code(folder: Path) -> RopeRule | None:
    """What the checkpoint's own code does with rope_ratio, read as text; nothing is run. None if it does not say.

    ChatGLM2-6B-32k divides the position by it, ChatGLM3-6B-32k multiplies the base; config.json looks the same.
    """
    code = folder / "modeling_chatglm.py"
    if not code.is_file():
        return None
    text = code.read_text(encoding="utf-8", errors="replace")
    divides, multiplies = "/ self.rope_ratio" in text, "base * self.rope_ratio" in text
    if divides == multiplies:
        return None
    return "linear" if divides else "base"


def glm_config(network: Network, rope: RopeRule, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` for transformers' GLM. Every default of GLM-4 that differs is set."""
    rope_parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": ROTARY_BASE,
        "partial_rotary_factor": ROTARY_PART,
    }
    if rope == "base":
        rope_parameters["rope_theta"] = ROTARY_BASE * network.rope_ratio
    elif network.rope_ratio != 1:
        rope_parameters |= {"rope_type": "linear", "factor": network.rope_ratio}
    return {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": network.vocab_size,
        "hidden_size": network.hidden_size,
        "intermediate_size": network.intermediate_size,
        "num_hidden_layers": network.num_layers,
        "num_attention_heads": network.num_heads,
        "num_key_value_heads": network.num_kv_heads,
        "head_dim": network.head_dim,
        "hidden_act": "silu",
        "attention_bias": network.has_qkv_bias,
        "attention_dropout": 0.0,
        "rms_norm_eps": network.norm_epsilon,
        "max_position_embeddings": network.max_positions,
        "rope_parameters": rope_parameters,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def pieces_of(network: Network) -> dict[str, Piece]:
    """Every tensor that the checkpoint must have, by its original name."""
    hidden, heads = network.hidden_size, network.num_heads * network.head_dim
    qkv = heads + 2 * network.num_kv_heads * network.head_dim
    ffn = network.intermediate_size
    pieces = {
        "transformer.embedding.word_embeddings.weight": _renamed(
            "model.embed_tokens.weight", network.vocab_size, hidden
        ),
        "transformer.encoder.final_layernorm.weight": _renamed("model.norm.weight", hidden),
        "transformer.output_layer.weight": _renamed("lm_head.weight", network.vocab_size, hidden),
    }
    for i in range(network.num_layers):
        old, new, quantized = f"transformer.encoder.layers.{i}", f"model.layers.{i}", bool(network.bits)
        split = _qkv_splitter(network, f"{new}.self_attn")
        pieces |= {
            f"{old}.input_layernorm.weight": _renamed(f"{new}.input_layernorm.weight", hidden),
            f"{old}.post_attention_layernorm.weight": _renamed(f"{new}.post_attention_layernorm.weight", hidden),
            f"{old}.self_attention.query_key_value.weight": Piece((qkv, hidden), split("weight"), quantized),
            f"{old}.self_attention.dense.weight": _renamed(
                f"{new}.self_attn.o_proj.weight", hidden, heads, is_quantized=quantized
            ),
            # the rows are the gate's and then the up projection's, which is GLM's order too
            f"{old}.mlp.dense_h_to_4h.weight": _renamed(
                f"{new}.mlp.gate_up_proj.weight", 2 * ffn, hidden, is_quantized=quantized
            ),
            f"{old}.mlp.dense_4h_to_h.weight": _renamed(
                f"{new}.mlp.down_proj.weight", hidden, ffn, is_quantized=quantized
            ),
        }
        if network.has_qkv_bias:
            pieces[f"{old}.self_attention.query_key_value.bias"] = Piece((qkv,), split("bias"))
    return pieces


def _renamed(name: str, *shape: int, is_quantized: bool = False) -> Piece:
    return Piece(shape, lambda tensor: iter([(name, tensor)]), is_quantized)


def _qkv_splitter(network: Network, prefix: str) -> Callable[[str], Callable[[Tensor], Iterator[tuple[str, Tensor]]]]:
    """With groups the rows are all queries, then all keys, then all values; without, each head has its own three."""
    heads, groups, width = network.num_heads, network.num_kv_heads, network.head_dim

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        if network.is_multi_query:
            return torch.split(tensor, [heads * width, groups * width, groups * width])
        by_head = tensor.reshape(heads, 3, width, *tensor.shape[1:])
        return tuple(by_head[:, i].reshape(heads * width, *tensor.shape[1:]) for i in range(3))

    def named(suffix: str) -> Callable[[Tensor], Iterator[tuple[str, Tensor]]]:
        names = [f"{prefix}.{letter}_proj.{suffix}" for letter in "qkv"]
        return lambda tensor: zip(names, split(tensor), strict=True)

    return named


def check_tensors(found: Mapping[str, TensorInfo], pieces: Mapping[str, Piece], bits: int) -> None:
    """Every tensor there, none too many, each with its shape and a type that fits. Raises ImportRefused."""
    expected = {name: piece.shape for name, piece in pieces.items()}
    for name, piece in pieces.items():
        if piece.is_quantized:
            expected[name] = packed_shape(piece.shape, bits)
            expected[f"{name}_scale"] = (piece.shape[0],)
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ImportRefused(f"the checkpoint lacks {len(missing)} of {len(expected)} tensors, first {missing[0]}")
    extra = sorted(found.keys() - expected.keys() - set(DROPPED))
    if extra:
        raise ImportRefused(
            f"the checkpoint has {len(extra)} tensors that this network does not know, first {extra[0]}"
        )
    for name, shape in expected.items():
        info, is_packed = found[name], name in pieces and pieces[name].is_quantized
        if not is_packed and info.dtype not in FLOATS:
            raise ImportRefused(
                f"tensor {name} is {info.dtype}, not a float, though config.json says quantization_bit={bits}"
            )
        if is_packed and info.dtype != torch.int8:
            raise ImportRefused(f"tensor {name} is {info.dtype}, though config.json says quantization_bit={bits}")
        if info.shape != shape:
            raise ImportRefused(f"tensor {name} has shape {list(info.shape)}; config.json says {list(shape)}")


def convert(source: Path, target: Path, rope: RopeRule | None, progress: Progress) -> dict[str, Any]:
    """Write the checkpoint in `source` into `target` as a folder that GlmForCausalLM loads; return its metadata.

    `rope` says what rope_ratio means; None refuses a ratio other than 1. Everything is checked before the first byte
    is written. Raises ImportRefused.
    """
    network = read_network(checkpoint.read_json(source / "config.json"))
    if network.rope_ratio != 1 and rope is None:
        raise ImportRefused(
            f"config.json says rope_ratio={network.rope_ratio:g} and does not say what it does: add --rope linear "
            "(the position is divided by it, as in chatglm2-6b-32k) or --rope base (the base is multiplied)"
        )
    shards, pieces = checkpoint.find_shards(source), pieces_of(network)
    found = checkpoint.inspect_shards(shards)
    check_tensors(found, pieces, network.bits)
    dtype = torch.float16 if network.bits else found["transformer.embedding.word_embeddings.weight"].dtype
    checkpoint.require_space(target, _output_bytes(found, pieces))
    checkpoint.write_json(target / "config.json", glm_config(network, rope or "linear", dtype))
    packed = {name for name, piece in pieces.items() if piece.is_quantized}
    writer = checkpoint.ShardWriter(target)
    for name, tensor in read_weights(shards, found, packed, network.bits, progress):
        if name in pieces:
            for new_name, part in pieces[name].split(tensor):
                writer.add(new_name, part)
    writer.finish()
    return {
        "context_length": network.max_positions,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(_num_elements(piece.shape) for piece in pieces.values()),
        "source_precision": f"int{network.bits}" if network.bits else str(dtype).removeprefix("torch."),
    }


def _output_bytes(found: Mapping[str, TensorInfo], pieces: Mapping[str, Piece]) -> int:
    return sum(
        _num_elements(piece.shape) * (2 if piece.is_quantized else found[name].dtype.itemsize)
        for name, piece in pieces.items()
    )


def _num_elements(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
