"""Reads an original ChatGLM-6B (v1) checkpoint, stores it in our own layout and opens it again. Knows no prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import linears, linears_cuda
from kernels.precision import Precision, Progress
from models.checkpoints import shards as checkpoint
from models.checkpoints.chatglm_quantized import packed_shape, read_weights
from models.checkpoints.shards import ShardWriter, TensorInfo
from models.family import ImportRefused
from models.networks.chatglm import ChatGLMConfig, ChatGLMNetwork, rotary_frequencies
from models.tokenizers.chatglm import ChatGLMTokenizer

TOKENIZER_FILE = "ice_text.model"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# What only ChatGLM2 and ChatGLM3 have; all three say model_type "chatglm".
LATER_KEYS = ("padded_vocab_size", "ffn_hidden_size", "multi_query_attention", "rmsnorm")
LINEARS = {
    "query_key_value": "attention.query_key_value",
    "dense": "attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
}


def read_config(config: Mapping[str, Any]) -> ChatGLMConfig:
    """Check `config.json` of a checkpoint. Raises ImportRefused for what the network does not compute.

    It does not say how many ids have a text (num_tokens); that is the tokenizer's to say.
    """
    if config.get("model_type") != "chatglm":
        raise ImportRefused(f"config.json says model_type {config.get('model_type')!r}, not 'chatglm'")
    if any(key in config for key in LATER_KEYS):
        raise ImportRefused("config.json is of a later ChatGLM: import it with the family chatglm2 or chatglm3")
    if config.get("position_encoding_2d", True) is not True:
        raise ImportRefused("config.json says position_encoding_2d=false, which ChatGLM-6B never had")
    if config.get("pre_seq_len") is not None:
        raise ImportRefused("this is a P-Tuning checkpoint with a prefix encoder (pre_seq_len): import its base model")
    if quantization_bits(config) not in (0, 4, 8):
        raise ImportRefused(f"config.json says quantization_bit={config['quantization_bit']!r}; only 4 and 8 exist")
    hidden_size, num_heads = checkpoint.count(config, "hidden_size"), checkpoint.count(config, "num_attention_heads")
    if hidden_size % (4 * num_heads):
        raise ImportRefused(f"hidden_size {hidden_size} does not divide into {num_heads} heads with two rotary halves")
    return ChatGLMConfig(
        num_layers=checkpoint.count(config, "num_layers"),
        num_heads=num_heads,
        hidden_size=hidden_size,
        inner_hidden_size=checkpoint.count(config, "inner_hidden_size"),
        vocab_size=checkpoint.count(config, "vocab_size"),
        num_tokens=checkpoint.count(config, "vocab_size"),
        max_positions=checkpoint.count(config, "max_sequence_length"),
        layernorm_epsilon=float(config.get("layernorm_epsilon", 1e-5)),
        bos_token_id=checkpoint.count(config, "bos_token_id"),
        eos_token_id=checkpoint.count(config, "eos_token_id"),
        mask_token_id=checkpoint.count(config, "mask_token_id"),
        gmask_token_id=checkpoint.count(config, "gmask_token_id"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
    )


def quantization_bits(config: Mapping[str, Any]) -> Any:
    """What config.json says of packed weights; 0 for plain ones."""
    return config.get("quantization_bit") or 0


def find_num_image_tokens(tokenizer_file: Path, config: ChatGLMConfig) -> int:
    """How far ids are shifted by image tokens: 20,000 in the earliest checkpoints, 0 in the others.

    Nothing in config.json says so, but where <sop> stands does; every other special id has to agree.
    """
    if not tokenizer_file.is_file():
        raise ImportRefused(f"{tokenizer_file.parent} has no {tokenizer_file.name}: download it into the same folder")
    checkpoint.refuse_pointer(tokenizer_file)
    try:
        tokenizer = ChatGLMTokenizer(tokenizer_file, num_image_tokens=0)
    except (OSError, RuntimeError):
        raise ImportRefused(f"{tokenizer_file} is not a SentencePiece model: download it again") from None
    special_ids = {
        "<sop>": config.bos_token_id,
        "<eop>": config.eos_token_id,
        "[MASK]": config.mask_token_id,
        "[gMASK]": config.gmask_token_id,
    }
    offsets: set[int] = set()
    for name, token_id in special_ids.items():
        piece = tokenizer.special_id(name)
        if piece is None:
            raise ImportRefused(f"{tokenizer_file} has no token {name}: it belongs to another model")
        offsets.add(token_id - piece)
    offset = offsets.pop()
    if offsets or offset < 0 or offset + tokenizer.num_tokens > config.vocab_size:
        raise ImportRefused(f"the ids and the vocab_size of config.json do not fit {tokenizer_file.name}")
    return offset


def tensor_names(config: ChatGLMConfig) -> dict[str, str]:
    """Original name -> name in the network, for every tensor that the network has."""
    names = {
        "transformer.word_embeddings.weight": "word_embeddings.weight",
        "transformer.final_layernorm.weight": "final_layernorm.weight",
        "transformer.final_layernorm.bias": "final_layernorm.bias",
    }
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = "lm_head.weight"
    for layer in range(config.num_layers):
        for kind in ("weight", "bias"):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                names[f"transformer.layers.{layer}.{norm}.{kind}"] = f"layers.{layer}.{norm}.{kind}"
            for new, old in LINEARS.items():
                owner = "attention." if old.startswith("attention.") else ""
                names[f"transformer.layers.{layer}.{old}.{kind}"] = f"layers.{layer}.{owner}{new}.{kind}"
    return names


def convert(source: Path, target: Path, config: ChatGLMConfig, bits: int, progress: Progress) -> dict[str, Any]:
    """Write the weights into `target` under the network's names. Everything is checked before the first byte."""
    shards = checkpoint.find_shards(source)
    found = checkpoint.inspect_shards(shards)
    names = tensor_names(config)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in ChatGLMNetwork(config).state_dict().items()}
    packed = _check_tensors(found, names, shapes, config, bits)
    embeddings = found["transformer.word_embeddings.weight"]
    dtype = torch.float16 if embeddings.dtype == torch.int8 else embeddings.dtype
    sizes = [torch.Size(shapes[names[name]]).numel() for name in names]
    checkpoint.require_space(target, sum(sizes) * dtype.itemsize)
    writer = ShardWriter(target)
    for name, tensor in read_weights(shards, found, packed, bits, progress):
        if name in names:
            writer.add(names[name], tensor)
        elif name.endswith("inv_freq"):
            _check_frequencies(name, tensor, config)
    writer.finish()
    precision = str(dtype).removeprefix("torch.")
    return {"dtype": precision, "parameters": sum(sizes), "source_precision": f"int{bits}" if bits else precision}


def _check_tensors(
    found: Mapping[str, TensorInfo],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    config: ChatGLMConfig,
    bits: int,
) -> set[str]:
    """Every tensor there, none too many, each of its shape. Returns the names of those that are packed in bytes."""
    missing = sorted(names.keys() - found.keys())
    if missing:
        raise ImportRefused(f"the checkpoint lacks {len(missing)} of {len(names)} tensors, first {missing[0]}")
    packed = {name for name in names if f"{name}_scale" in found}
    linears = {name for name in names if name.endswith(tuple(f"{linear}.weight" for linear in LINEARS.values()))}
    if bits and linears - packed:
        raise ImportRefused(
            f"config.json says quantization_bit={bits}, but the checkpoint lacks {min(linears - packed)}_scale"
        )
    for name in names:
        shape = shapes[names[name]]
        expected = packed_shape(shape, bits) if name in packed and bits else shape
        fits = found[name].dtype == torch.int8 if name in packed and bits else found[name].dtype in FLOATS
        if found[name].shape != expected or not fits:
            raise ImportRefused(
                f"tensor {name} is {found[name].dtype} of shape {list(found[name].shape)}; config.json "
                f"(quantization_bit={bits}) says {list(expected)}"
            )
        if name in packed and found[f"{name}_scale"].shape != shape[:1]:
            raise ImportRefused(f"tensor {name}_scale does not have one value for each of {shape[0]} rows")
    # a tied head is stored as well; the original overwrites it with the embedding
    copies = {"lm_head.weight", "lm_head.weight_scale"} if config.tie_word_embeddings else set[str]()
    known = names.keys() | {f"{name}_scale" for name in packed} | copies
    extra = sorted(name for name in found.keys() - known if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        raise ImportRefused(
            f"the checkpoint has {len(extra)} tensors that this network does not know, first {extra[0]}"
        )
    return packed


def _check_frequencies(name: str, stored: Tensor, config: ChatGLMConfig) -> None:
    """The network computes its rotary frequencies; a checkpoint with others would answer nonsense without a word."""
    expected = rotary_frequencies(config.head_dim)
    if stored.shape != expected.shape or not torch.allclose(stored.float(), expected, rtol=1e-2, atol=1e-4):
        raise ImportRefused(f"tensor {name} is not ChatGLM-6B's: another rotary base is not supported")


def write_config(target: Path, config: ChatGLMConfig, num_image_tokens: int) -> None:
    """Our own config.json; `read_stored` reads it back."""
    checkpoint.write_json(target / "config.json", {"network": asdict(config), "num_image_tokens": num_image_tokens})


def read_stored(folder: Path) -> tuple[ChatGLMConfig, int]:
    """The network's numbers and num_image_tokens of a stored folder."""
    stored = checkpoint.read_json(folder / "config.json")
    return ChatGLMConfig(**stored["network"]), int(stored["num_image_tokens"])


def load_network(
    folder: Path, config: ChatGLMConfig, device: torch.device, precision: Precision, progress: Progress
) -> ChatGLMNetwork:
    """Open stored weights, tensor by tensor: never two copies of the model in memory."""
    with torch.device("meta"):
        network = ChatGLMNetwork(config)
    shards = checkpoint.find_shards(folder)
    read_to = linears_cuda.load_device(precision, device)
    total, done = sum(shard.stat().st_size for shard in shards), 0
    for shard in shards:
        # copied, as what comes from the file is a view of it
        state = {
            name: tensor.to(read_to, linears.storage_dtype(precision, device, tensor.dtype), copy=True)
            for name, tensor in checkpoint.read_shard(shard)
        }
        network.load_state_dict(state, strict=False, assign=True)
        done += shard.stat().st_size
        progress(done, total, shard.name)
    if config.tie_word_embeddings:
        network.lm_head.weight = network.word_embeddings.weight
    network.eval().requires_grad_(False)
    linears.pack(network, precision, device, progress)
    network.device, network.dtype = device, linears.compute_dtype(precision, device)
    return network
