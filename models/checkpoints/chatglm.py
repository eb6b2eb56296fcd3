"""A checkpoint of ChatGLM-6B, the first version -> a folder in our own layout, and that folder -> its network."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import linears
from kernels.precision import Precision, Progress
from models.checkpoints import ptuning
from models.checkpoints.chatglm_tensors import SCALE, check_tensors, read_dequantized
from models.checkpoints.files import positive_int, read_json, refuse_lfs_pointer, require_space, write_json
from models.checkpoints.shards import ShardWriter, find_shards, inspect_shards, read_tensors
from models.family import ImportRefused
from models.networks.chatglm import ChatGLMConfig, ChatGLMNetwork, rotary_frequencies
from models.tokenizers.chatglm import ChatGLMTokenizer

TOKENIZER_FILE = "ice_text.model"
# Keys that only ChatGLM2 and ChatGLM3 have; all three say model_type "chatglm".
LATER_KEYS = ("padded_vocab_size", "ffn_hidden_size", "multi_query_attention", "rmsnorm")
LINEARS = ("query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")


def read_config(config: Mapping[str, Any]) -> ChatGLMConfig:
    """Check `config.json` of a checkpoint. Raises ImportRefused for values that the network does not compute.

    `num_tokens`, the number of ids that have a text, is vocab_size here; the tokenizer has the right number.
    """
    if config.get("model_type") != "chatglm":
        raise ImportRefused(f"config.json says model_type {config.get('model_type')!r}, not 'chatglm'")
    if any(key in config for key in LATER_KEYS):
        raise ImportRefused("config.json is that of a later ChatGLM: import it with the family chatglm2 or chatglm3")
    if config.get("position_encoding_2d", True) is not True:
        raise ImportRefused("config.json says position_encoding_2d=false, which ChatGLM-6B never had")
    hidden_size, num_heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
    if hidden_size % (4 * num_heads):
        raise ImportRefused(f"hidden_size {hidden_size} is not a multiple of 4 times the {num_heads} attention heads")
    return ChatGLMConfig(
        num_layers=positive_int(config, "num_layers"),
        num_heads=num_heads,
        hidden_size=hidden_size,
        inner_hidden_size=positive_int(config, "inner_hidden_size"),
        vocab_size=positive_int(config, "vocab_size"),
        num_tokens=positive_int(config, "vocab_size"),
        max_positions=positive_int(config, "max_sequence_length"),
        layernorm_epsilon=float(config.get("layernorm_epsilon", 1e-5)),
        bos_token_id=positive_int(config, "bos_token_id"),
        eos_token_id=positive_int(config, "eos_token_id"),
        mask_token_id=positive_int(config, "mask_token_id"),
        gmask_token_id=positive_int(config, "gmask_token_id"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
    )


def find_num_image_tokens(tokenizer_file: Path, config: ChatGLMConfig) -> int:
    """The number of image tokens in front of the text's ids: 20,000 in the earliest checkpoints, 0 in the others.

    config.json does not contain it, but the id of <sop> does; the other special ids have to agree.
    """
    if not tokenizer_file.is_file():
        raise ImportRefused(f"{tokenizer_file.parent} has no {tokenizer_file.name}: download it into the same folder")
    refuse_lfs_pointer(tokenizer_file)
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
    names = [name for name in _empty_network(config).state_dict() if name != "lm_head.weight"]
    originals = {re.sub(r"\.(dense_\d?h_to)", r".mlp.\1", f"transformer.{name}"): name for name in names}
    return originals if config.tie_word_embeddings else originals | {"lm_head.weight": "lm_head.weight"}


def _empty_network(config: ChatGLMConfig) -> ChatGLMNetwork:
    with torch.device("meta"):
        return ChatGLMNetwork(config)


def convert(source: Path, target: Path, config: ChatGLMConfig, bits: int, progress: Progress) -> dict[str, Any]:
    """Write the weights into `target` under the network's names; return metadata.

    Everything is checked before anything is written. Raises ImportRefused.
    """
    shards, names = find_shards(source), tensor_names(config)
    found = inspect_shards(shards)
    ptuning.check_declared(source, found)
    state = _empty_network(config).state_dict()
    shapes = {name: tuple(state[new_name].shape) for name, new_name in names.items()}
    # every linear layer of a quantised checkpoint is packed; the embedding is if it has a scale
    packed = {name for name in names if bits and (name.endswith(LINEARS) or f"{name}{SCALE}" in found)}
    # a tied output layer is stored as well; the original overwrites it with the embedding
    copies = ("lm_head.weight", f"lm_head.weight{SCALE}") if config.tie_word_embeddings else ()

    def is_ignored(name: str) -> bool:
        return name in copies or name.endswith("rotary_emb.inv_freq") or ptuning.is_encoder(name)

    check_tensors(found, shapes, packed, bits, is_ignored)
    embeddings = found["transformer.word_embeddings.weight"]
    dtype = torch.float16 if embeddings.dtype == torch.int8 else embeddings.dtype
    parameters = sum(map(math.prod, shapes.values()))
    require_space(target, parameters * dtype.itemsize)
    writer = ShardWriter(target)
    for name, tensor in read_dequantized(shards, packed, bits, progress):
        if name in names:
            writer.add(names[name], tensor)
        elif name.endswith("inv_freq"):
            _check_frequencies(name, tensor, config)
    writer.finish()
    precision = str(dtype).removeprefix("torch.")
    return {"dtype": precision, "parameters": parameters, "source_precision": f"int{bits}" if bits else precision}


def _check_frequencies(name: str, stored: Tensor, config: ChatGLMConfig) -> None:
    """Refuse other rotary frequencies than those that the network computes: its answers would be nonsense."""
    expected = rotary_frequencies(config.head_dim)
    if stored.shape != expected.shape or not torch.allclose(stored.float(), expected, rtol=1e-2, atol=1e-4):
        raise ImportRefused(f"tensor {name} is not ChatGLM-6B's: another rotary base is not supported")


def write_config(target: Path, config: ChatGLMConfig, num_image_tokens: int) -> None:
    """Our own config.json; `read_stored_config` reads it back."""
    write_json(target / "config.json", {"network": asdict(config), "num_image_tokens": num_image_tokens})


def read_stored_config(folder: Path) -> tuple[ChatGLMConfig, int]:
    """The network's configuration and num_image_tokens of a stored folder."""
    stored = read_json(folder / "config.json")
    return ChatGLMConfig(**stored["network"]), int(stored["num_image_tokens"])


def load_network(
    folder: Path, config: ChatGLMConfig, device: torch.device, precision: Precision, progress: Progress
) -> ChatGLMNetwork:
    """Open stored weights tensor by tensor, so that memory never holds the model twice."""
    network = _empty_network(config)
    load_device = linears.load_device(precision, device)
    for name, tensor in read_tensors(find_shards(folder), progress):
        # copied: the tensor is a view of the file
        weight = tensor.to(load_device, linears.storage_dtype(precision, device, tensor.dtype), copy=True)
        network.load_state_dict({name: weight}, strict=False, assign=True)
    if config.tie_word_embeddings:
        network.lm_head.weight = network.word_embeddings.weight
    network.eval().requires_grad_(False)
    linears.pack(network, precision, device, progress)
    network.device, network.dtype = device, linears.compute_dtype(precision, device)
    return network
