"""Weights of 8 and 4 bits: how they are made, kept in a folder and read again. Knows no kernel and no network.

    int8   a scale for each output channel: weight = values * scale
    int4   groups of GROUP weights along the input, a scale and a middle for each: weight = (value - 8) * scale + middle

A quantised folder is a transformers folder in which the weights of linear layers are stored so: NAME.weight holds the
values (int8 [out, in], or uint8 [out, in / 2] with two values a byte, the first one in the upper half), and
NAME.weight_scale the scales ([out] float32, or [in / GROUP, out, 2] bfloat16). MARK says that it is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kernels.precision import Precision, Progress
from kernels.quantization import QuantizedLinear, Small, quantize
from models.checkpoints import shards as checkpoint
from models.family import ImportRefused

MARK = "quantized.json"
SCALE = "_scale"
HEAD = "lm_head.weight"
NOT_TAKEN = {"model.yaml", "model.safetensors.index.json"}  # written anew


def stored_precision(folder: Path) -> Small | None:
    """What the folder's weights are quantised to; None if they are not."""
    mark = folder / MARK
    return cast("Small", checkpoint.read_json(mark)["precision"]) if mark.is_file() else None


def _linear_names(folder: Path) -> tuple[set[str], bool]:
    """The names of the weights that are quantised, and whether the head is the embedding."""
    model = _skeleton(folder)
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    is_tied = bool(model.config.tie_word_embeddings)
    return names, is_tied


def _skeleton(folder: Path) -> PreTrainedModel:
    """The network without weights; its buffers are real."""
    from accelerate import init_empty_weights  # vLLM's environment imports this file and has no accelerate

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def quantize_folder(source: Path, target: Path, precision: Small, progress: Progress) -> None:
    """Write a stored transformers folder again with small weights; every other file is linked. The head stays int8.

    Reads and writes tensor by tensor. Raises ImportRefused.
    """
    if stored := stored_precision(source):
        raise ImportRefused(f"it is in {stored} already; quantise the model that it was made from")
    linears, is_tied = _linear_names(source)
    shards = checkpoint.find_shards(source)
    found = checkpoint.inspect_shards(shards)
    total, done = sum(info.num_bytes for info in found.values()), 0
    checkpoint.require_space(target, total * 5 // 8)
    for path in source.iterdir():
        if path.is_file() and path not in shards and path.name not in NOT_TAKEN:
            checkpoint.link_or_copy(path, target / path.name)
    writer = checkpoint.ShardWriter(target)
    for shard in shards:
        for name, tensor in checkpoint.read_shard(shard):
            is_head = is_tied and name.endswith("embed_tokens.weight")
            if is_head:
                writer.add(name, tensor)
            if name in linears or is_head:
                target_name = HEAD if is_head else name
                values, scale = quantize(tensor, "int8" if target_name == HEAD else precision)
                writer.add(target_name, values)
                writer.add(f"{target_name}{SCALE}", scale)
            else:
                writer.add(name, tensor)
            done += found[name].num_bytes
            progress(done, total, f"quantising to {precision}")
    writer.finish()
    checkpoint.write_json(target / MARK, {"precision": precision})


def load_quantized(folder: Path, progress: Progress) -> PreTrainedModel:
    """The network of a quantised folder, its linear layers as QuantizedLinear, everything mapped from the files."""
    model = _skeleton(folder)
    shards = checkpoint.find_shards(folder)
    total, done = sum(shard.stat().st_size for shard in shards), 0
    scales: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for shard in shards:
        for name, tensor in checkpoint.read_shard(shard):
            if name.endswith(f".weight{SCALE}"):
                scales[name.removesuffix(f".weight{SCALE}")] = tensor
            elif tensor.dtype in (torch.int8, torch.uint8):
                values[name.removesuffix(".weight")] = tensor
            else:
                rest[name] = tensor
            done += tensor.nbytes
        progress(min(done, total), total, "weights")
    for name, tensor in values.items():
        parent, _, child = name.rpartition(".")
        layer = QuantizedLinear(tensor, scales[name], rest.pop(f"{name}.bias", None))
        setattr(model.get_submodule(parent), child, layer)
    _assign(model, rest)
    return cast("PreTrainedModel", model.eval().requires_grad_(False))


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give every other parameter its tensor. Raises ImportRefused if one is missing or left over."""
    outcome: Any = model.load_state_dict(tensors, strict=False, assign=True)
    strange = [*outcome.missing_keys, *outcome.unexpected_keys]
    if strange:
        raise ImportRefused(f"the quantised weights do not fit config.json ({strange[0]} …): quantise the model again")


def is_quantized(folder: Path, precision: Precision) -> bool:
    """Whether the folder's weights are stored in `precision`, one of the small ones. Raises ImportRefused if they are
    stored in another small one."""
    stored = stored_precision(folder)
    if stored not in (None, precision):
        raise ImportRefused(f"the model is stored in {stored}; leave CHATGLM_PRECISION at auto or set it to {stored}")
    return stored is not None
