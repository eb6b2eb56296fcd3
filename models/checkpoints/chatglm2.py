"""A checkpoint of ChatGLM2's network -> a folder of transformers' GLM.

ChatGLM2, ChatGLM3 and CodeGeeX2 share the network, and it is the one that transformers calls `glm`; only the names
differ, and query, key and value are one matrix. Source: modeling_chatglm.py of the three, compared by running both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.precision import Progress
from models.checkpoints import ptuning
from models.checkpoints.chatglm_tensors import check_tensors, quantization_bits, read_dequantized
from models.checkpoints.files import positive_int, read_json, require_space, write_json
from models.checkpoints.shards import ShardWriter, find_shards, inspect_shards
from models.family import ImportRefused

RopeRule = Literal["linear", "base"]

ROTARY_BASE = 10_000.0
ROTARY_PART = 0.5  # of each head's channels
IGNORED = ("transformer.rotary_pos_emb.inv_freq", "rotary_pos_emb.inv_freq")  # computed from the configuration

# flag, the original's default, the only value that the GLM network computes, and the meaning of any other value
FLAGS: tuple[tuple[str, object, object, str], ...] = (
    ("rmsnorm", True, True, "LayerNorm instead of RMSNorm"),
    ("apply_residual_connection_post_layernorm", False, False, "residuals taken after the norm"),
    ("post_layer_norm", True, True, "no final norm"),
    ("add_bias_linear", False, False, "biases in the dense layers"),
    ("fp32_residual_connection", False, False, "residuals in another precision"),
    ("original_rope", True, True, "another rotary embedding"),
    ("rotary_percent", 0.5, 0.5, "another rotary part"),
    ("interleaved_qkv", False, False, "another order of query, key and value"),
    ("tie_word_embeddings", False, False, "an output layer tied to the embedding"),
)
OTHER_MODELS = (
    ("position_encoding_2d", "ChatGLM-6B (the first version): import it with the family chatglm"),
    ("inner_hidden_size", "ChatGLM-6B (the first version): import it with the family chatglm"),
    ("vision_config", "a GLM-4V checkpoint, which takes images: it cannot be imported"),
)


@dataclass(frozen=True)
class ChatGLM2Config:
    """The checked values of `config.json`."""

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
    bits: int  # of a packed weight; 0: not quantised
    rope_ratio: float


@dataclass(frozen=True)
class TensorMapping:
    """One original tensor: the shape that it must have, and the tensors of the GLM network that it contains."""

    shape: tuple[int, ...]
    split: Callable[[Tensor], Iterator[tuple[str, Tensor]]]
    is_packed: bool = False  # in a quantised checkpoint


def read_config(config: Mapping[str, Any]) -> ChatGLM2Config:
    """Check `config.json` of a checkpoint. Raises ImportRefused for values that the GLM network cannot compute."""
    if config.get("model_type") != "chatglm":
        raise ImportRefused(
            f"config.json says model_type {config.get('model_type')!r}, not 'chatglm': "
            "choose the family that fits (hf for models that transformers knows)"
        )
    for name, what in OTHER_MODELS:
        if config.get(name) not in (None, False):
            raise ImportRefused(f"config.json has {name!r}: this is {what}")
    for name, default, supported, meaning in FLAGS:
        if config.get(name, default) != supported:
            raise ImportRefused(f"config.json says {name}={config[name]!r} ({meaning}), which is not supported")
    num_heads = positive_int(config, "num_attention_heads")
    is_multi_query = bool(config.get("multi_query_attention", False))
    num_kv_heads = positive_int(config, "multi_query_group_num") if is_multi_query else num_heads
    if num_heads % num_kv_heads:
        raise ImportRefused(f"config.json has {num_heads} attention heads, not a multiple of {num_kv_heads} groups")
    return ChatGLM2Config(
        num_layers=positive_int(config, "num_layers"),
        hidden_size=positive_int(config, "hidden_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=positive_int(config, "kv_channels"),
        intermediate_size=positive_int(config, "ffn_hidden_size"),
        vocab_size=positive_int(config, "padded_vocab_size"),
        max_positions=positive_int(config, "seq_length"),
        norm_epsilon=_positive(config, "layernorm_epsilon", 1e-5),
        has_qkv_bias=bool(config.get("add_qkv_bias", False)),
        is_multi_query=is_multi_query,
        bits=quantization_bits(config),
        rope_ratio=_positive(config, "rope_ratio", 1.0),
    )


def _positive(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ImportRefused(f"config.json has no usable {name!r} ({value!r}); it must be a positive number")
    return float(value)


def rope_rule_in_code(folder: Path) -> RopeRule | None:
    """What the checkpoint's own code does with rope_ratio, read as text and never run. None if it does not say.

    ChatGLM2-6B-32k divides the position by it, ChatGLM3-6B-32k multiplies the base; config.json looks the same.
    """
    code = folder / "modeling_chatglm.py"
    if not code.is_file():
        return None
    text = code.read_text(encoding="utf-8", errors="replace")
    divides, multiplies = "/ self.rope_ratio" in text, "base * self.rope_ratio" in text
    return None if divides == multiplies else "linear" if divides else "base"


def glm_config(config: ChatGLM2Config, rope: RopeRule, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` for transformers' GLM. Sets every value that differs from GLM-4's default."""
    rope_parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": ROTARY_BASE,
        "partial_rotary_factor": ROTARY_PART,
    }
    if rope == "base":
        rope_parameters["rope_theta"] = ROTARY_BASE * config.rope_ratio
    elif config.rope_ratio != 1:
        rope_parameters |= {"rope_type": "linear", "factor": config.rope_ratio}
    return {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": config.has_qkv_bias,
        "attention_dropout": 0.0,
        "rms_norm_eps": config.norm_epsilon,
        "max_position_embeddings": config.max_positions,
        "rope_parameters": rope_parameters,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def tensor_mappings(config: ChatGLM2Config) -> dict[str, TensorMapping]:
    """Every tensor that the checkpoint must have, by its original name."""
    hidden, width = config.hidden_size, config.num_heads * config.head_dim
    qkv, inner = width + 2 * config.num_kv_heads * config.head_dim, config.intermediate_size
    mappings = {
        "transformer.embedding.word_embeddings.weight": _renamed(
            "model.embed_tokens.weight", config.vocab_size, hidden
        ),
        "transformer.encoder.final_layernorm.weight": _renamed("model.norm.weight", hidden),
        "transformer.output_layer.weight": _renamed("lm_head.weight", config.vocab_size, hidden),
    }
    linear = partial(_renamed, is_packed=config.bits > 0)
    for i in range(config.num_layers):
        old, new = f"transformer.encoder.layers.{i}", f"model.layers.{i}"
        split_qkv = partial(_split_qkv, config, f"{new}.self_attn")
        mappings |= {
            f"{old}.input_layernorm.weight": _renamed(f"{new}.input_layernorm.weight", hidden),
            f"{old}.post_attention_layernorm.weight": _renamed(f"{new}.post_attention_layernorm.weight", hidden),
            f"{old}.self_attention.query_key_value.weight": TensorMapping(
                (qkv, hidden), partial(split_qkv, "weight"), config.bits > 0
            ),
            f"{old}.self_attention.dense.weight": linear(f"{new}.self_attn.o_proj.weight", hidden, width),
            # the rows of the gate, then those of the up projection, which is GLM's order too
            f"{old}.mlp.dense_h_to_4h.weight": linear(f"{new}.mlp.gate_up_proj.weight", 2 * inner, hidden),
            f"{old}.mlp.dense_4h_to_h.weight": linear(f"{new}.mlp.down_proj.weight", hidden, inner),
        }
        if config.has_qkv_bias:
            bias = TensorMapping((qkv,), partial(split_qkv, "bias"))
            mappings[f"{old}.self_attention.query_key_value.bias"] = bias
    return mappings


def _renamed(name: str, *shape: int, is_packed: bool = False) -> TensorMapping:
    return TensorMapping(shape, lambda tensor: iter([(name, tensor)]), is_packed)


def _split_qkv(config: ChatGLM2Config, prefix: str, kind: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """With groups the rows are all queries, then all keys, then all values; without, each head has its own three."""
    heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
    if config.is_multi_query:
        parts: Sequence[Tensor] = torch.split(tensor, [heads * width, groups * width, groups * width])
    else:
        by_head = tensor.reshape(heads, 3, width, *tensor.shape[1:])
        parts = [by_head[:, i].reshape(heads * width, *tensor.shape[1:]) for i in range(3)]
    return zip((f"{prefix}.{letter}_proj.{kind}" for letter in "qkv"), parts, strict=True)


def convert(source: Path, target: Path, rope: RopeRule | None, progress: Progress) -> dict[str, Any]:
    """Write the checkpoint in `source` into `target` as a folder that GlmForCausalLM loads; return its metadata.

    `rope` says what rope_ratio means; None refuses a ratio other than 1. Everything is checked before anything is
    written. Raises ImportRefused.
    """
    config = read_config(read_json(source / "config.json"))
    if config.rope_ratio != 1 and rope is None:
        raise ImportRefused(
            f"config.json says rope_ratio={config.rope_ratio:g} but not what it does: add --rope linear "
            "(the position is divided by it, as in chatglm2-6b-32k) or --rope base (the base is multiplied)"
        )
    shards, mappings = find_shards(source), tensor_mappings(config)
    found = inspect_shards(shards)
    ptuning.check_declared(source, found)
    shapes = {name: mapping.shape for name, mapping in mappings.items()}
    packed = {name for name, mapping in mappings.items() if mapping.is_packed}
    check_tensors(found, shapes, packed, config.bits, lambda name: name in IGNORED or ptuning.is_encoder(name))
    dtype = torch.float16 if config.bits else found["transformer.embedding.word_embeddings.weight"].dtype
    itemsize = {name: 2 if name in packed else found[name].dtype.itemsize for name in shapes}
    require_space(target, sum(math.prod(shape) * itemsize[name] for name, shape in shapes.items()))
    write_json(target / "config.json", glm_config(config, rope or "linear", dtype))
    writer = ShardWriter(target)
    for name, tensor in read_dequantized(shards, packed, config.bits, progress):
        if name in mappings:
            for new_name, part in mappings[name].split(tensor):
                writer.add(new_name, part)
    writer.finish()
    precision = str(dtype).removeprefix("torch.")
    return {
        "context_length": config.max_positions,
        "dtype": precision,
        "parameters": sum(map(math.prod, shapes.values())),
        "source_precision": f"int{config.bits}" if config.bits else precision,
    }
