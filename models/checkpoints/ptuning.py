"""P-Tuning v2: a trained prefix encoder -> the constant keys and values that every sequence begins with.

The encoder's output for each virtual token is [layer][key, value][head][channel]. With a projection it is embedding,
linear, tanh, linear. The keys are not rotated, and the tokens behind the prefix count from position 0. The encoder
computes in float32. Source: modeling_chatglm.py of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B, PrefixEncoder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear

from models.checkpoints.files import read_json
from models.checkpoints.shards import find_shards, read_shard
from models.family import ImportRefused
from serving.engine.interface import TrainedPrefix

NAME = "prefix_encoder."  # in the names of its tensors
FILE = "prefix.safetensors"
TABLE = "embedding.weight"
PROJECTION = ("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")


@dataclass(frozen=True)
class CacheShape:
    """Of one token in the KV cache of the network."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def is_encoder(name: str) -> bool:
    """Whether a tensor of a whole checkpoint belongs to its prefix encoder."""
    return name.startswith(f"transformer.{NAME}")


def check_declared(folder: Path, names: Iterable[str]) -> None:
    """Raise ImportRefused if config.json speaks of a prefix and none of the checkpoint's tensors is one."""
    if read_json(folder / "config.json").get("pre_seq_len") and not any(map(is_encoder, names)):
        raise ImportRefused("config.json has pre_seq_len, the weights no prefix: remove it and add --prefix DIR")


def find_prefix(folder: Path) -> dict[str, Tensor]:
    """The encoder's tensors in a checkpoint, without the names before them; empty if there are none."""
    found: dict[str, Tensor] = {}
    for shard in find_shards(folder):
        for name, tensor in read_shard(shard):
            _, is_encoder, rest = name.partition(NAME)
            if is_encoder:
                found[rest] = tensor.to(torch.float32, copy=True)
    return found


def evaluate(tensors: dict[str, Tensor], shape: CacheShape, folder: Path) -> TrainedPrefix:
    """Raises ImportRefused for an encoder that does not fit the network."""
    has_projection = any(name.startswith("trans.") for name in tensors)
    wanted = {TABLE, *(PROJECTION if has_projection else ())}
    if set(tensors) != wanted:
        lacking = ", ".join(sorted(wanted - set(tensors))) or "nothing"
        raise ImportRefused(f"the prefix encoder in {folder} lacks {lacking}, or has tensors of another kind")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ImportRefused(f"the prefix encoder in {folder} holds numbers that are not finite")
    rows = tensors[TABLE]
    if has_projection:
        first_weight, first_bias, second_weight, second_bias = (tensors[name] for name in PROJECTION)
        try:
            rows = linear(linear(rows, first_weight, first_bias).tanh(), second_weight, second_bias)
        except RuntimeError:
            raise ImportRefused(f"the matrices of the prefix encoder in {folder} do not fit each other") from None
    width = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ImportRefused(
            f"the prefix in {folder} has {rows.shape[-1]} numbers a token, the base's cache {width}: "
            "it was trained for another model"
        )
    parts = rows.view(len(rows), shape.num_layers, 2, shape.num_kv_heads, shape.head_dim)
    keys, values = parts.permute(2, 1, 0, 3, 4).unbind(0)
    return TrainedPrefix(keys.contiguous(), values.contiguous())


@torch.inference_mode()
def import_prefix(source: Path, chosen: str | None, target: Path, shape: CacheShape, limit: int) -> dict[str, Any]:
    """Write the prefix of the folder `chosen`, or else of the checkpoint itself, into `target`; returns metadata.

    limit: the most tokens that it may have. Raises ImportRefused.
    """
    folder = source if chosen is None else Path(chosen)
    if not folder.is_dir():
        raise ImportRefused(f"--prefix {folder} is not a folder")
    tensors = find_prefix(folder)
    if not tensors:
        if chosen is not None:
            raise ImportRefused(f"--prefix {folder}: there are no tensors of a prefix encoder in it")
        return {}
    prefix = evaluate(tensors, shape, folder)
    if not 0 < prefix.num_tokens <= limit:
        raise ImportRefused(f"the prefix in {folder} has {prefix.num_tokens} tokens; the model's context is {limit}")
    save_file({"keys": prefix.keys.clone(), "values": prefix.values.clone()}, target / FILE)
    (target / FILE).chmod(0o644)
    return {"prefix_tokens": prefix.num_tokens}


def load_prefix(folder: Path) -> TrainedPrefix | None:
    """Of a stored folder; None if it has none."""
    if not (folder / FILE).is_file():
        return None
    tensors = load_file(folder / FILE)
    return TrainedPrefix(tensors["keys"], tensors["values"])
