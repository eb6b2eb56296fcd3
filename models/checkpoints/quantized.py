"""A stored transformers folder -> the same model with int8 or int4 weights, and such a folder -> its network.

The weights of linear layers are stored in the formats of `kernels.quantization`: NAME.weight holds the values (int8
[out, in], or uint8 [out, in / 2] with two values a byte, the first one in the upper half), NAME.weight_scale the scales
([out] float32, or [out, groups] bfloat16), NAME.weight_middle the middles, if there are any. The file MARKER identifies
such a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kernels.layouts import INT8_FORMATS, LAYOUT_VERSION, Format, QuantizedWeight
from kernels.precision import Precision, Progress, QuantizedPrecision
from kernels.quantization import QuantizedLinear, pack_nibbles, quantize, unpack_nibbles
from models.checkpoints.files import link_or_copy, read_json, require_space, write_json
from models.checkpoints.shards import ShardWriter, find_shards, read_tensors
from models.checkpoints.transformers_lock import TRANSFORMERS_LOCK
from models.family import ImportRefused

MARKER = "quantized.json"
SCALE, MIDDLE = "_scale", "_middle"
OUTPUT_LAYER = "lm_head.weight"
REWRITTEN_FILES = {"model.yaml", "model.safetensors.index.json"}


def stored_precision(folder: Path) -> QuantizedPrecision | None:
    """What the folder's weights are quantised to; None if they are not."""
    marker = folder / MARKER
    return cast("QuantizedPrecision", read_json(marker)["precision"]) if marker.is_file() else None


def is_quantized(folder: Path, precision: Precision) -> bool:
    """Whether the weights are stored in `precision`. Raises ImportRefused if they are in another quantised one."""
    stored = stored_precision(folder)
    if stored is not None and read_json(folder / MARKER).get("version") != LAYOUT_VERSION:
        raise ImportRefused("the model was quantised by another version of this program: quantise it again")
    if stored not in (None, precision):
        raise ImportRefused(f"the model is stored in {stored}; leave CHATGLM_PRECISION at auto or set it to {stored}")
    return stored is not None


def _empty_model(folder: Path) -> PreTrainedModel:
    """The network with its parameters on the meta device; its buffers are real."""
    from accelerate import init_empty_weights  # vLLM's environment imports this file and has no accelerate

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with TRANSFORMERS_LOCK, init_empty_weights(include_buffers=False):
        return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def quantize_folder(source: Path, target: Path, precision: QuantizedPrecision, progress: Progress) -> None:
    """Write a stored transformers folder again with quantised weights; other files are linked. The output layer stays
    int8. Reads and writes tensor by tensor. Raises ImportRefused.
    """
    if stored := stored_precision(source):
        raise ImportRefused(f"it is in {stored} already; quantise the model that it was made from")
    model = _empty_model(source)
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    is_tied = bool(model.config.tie_word_embeddings)
    shards = find_shards(source)
    require_space(target, sum(shard.stat().st_size for shard in shards) * 5 // 8)
    for path in source.iterdir():
        if path.is_file() and path not in shards and path.name not in REWRITTEN_FILES:
            link_or_copy(path, target / path.name)
    writer = ShardWriter(target)
    for name, tensor in read_tensors(shards, progress, f"quantising to {precision}"):
        is_tied_embedding = is_tied and name.endswith("embed_tokens.weight")
        if is_tied_embedding or name not in linears:
            writer.add(name, tensor)
        if is_tied_embedding or name in linears:
            linear = OUTPUT_LAYER if is_tied_embedding else name
            add_weight(writer, linear, quantize(tensor, "int8" if linear == OUTPUT_LAYER else precision))
    writer.finish()
    write_marker(target, precision)


def write_marker(folder: Path, precision: QuantizedPrecision) -> None:
    write_json(folder / MARKER, {"precision": precision, "version": LAYOUT_VERSION})


def add_weight(writer: ShardWriter, name: str, weight: QuantizedWeight) -> None:
    """Store the weight of one linear layer. name: with `.weight` at its end."""
    is_int8 = weight.format in INT8_FORMATS
    writer.add(name, weight.values if is_int8 else pack_nibbles(weight.values))
    writer.add(f"{name}{SCALE}", weight.scale)
    if weight.middle is not None:
        writer.add(f"{name}{MIDDLE}", weight.middle)


def _read_weight(values: Tensor, scale: Tensor, middle: Tensor | None, num_inputs: int) -> QuantizedWeight:
    if values.dtype == torch.int8:
        return QuantizedWeight(Format.INT8 if scale.ndim == 2 else Format.INT8_ROW, values, scale)
    format = Format.INT4_ROW if scale.ndim == 1 else Format.INT4 if middle is None else Format.INT4_MIDDLE
    return QuantizedWeight(format, unpack_nibbles(values, num_inputs), scale, middle)


def load_quantized(folder: Path, progress: Progress) -> PreTrainedModel:
    """The network of a quantised folder, its linear layers as QuantizedLinear, everything mapped from the files."""
    model = _empty_model(folder)
    scales: dict[str, Tensor] = {}
    middles: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    parameters: dict[str, Tensor] = {}
    for name, tensor in read_tensors(find_shards(folder), progress, "weights"):
        if name.endswith(f".weight{SCALE}"):
            scales[name.removesuffix(f".weight{SCALE}")] = tensor
        elif name.endswith(f".weight{MIDDLE}"):
            middles[name.removesuffix(f".weight{MIDDLE}")] = tensor
        elif tensor.dtype in (torch.int8, torch.uint8):
            values[name.removesuffix(".weight")] = tensor
        else:
            parameters[name] = tensor
    for name, tensor in values.items():
        parent, _, child = name.rpartition(".")
        num_inputs = cast("nn.Linear", model.get_submodule(name)).in_features
        weight = _read_weight(tensor, scales[name], middles.get(name), num_inputs)
        layer = QuantizedLinear(weight, parameters.pop(f"{name}.bias", None))
        setattr(model.get_submodule(parent), child, layer)
    outcome: Any = model.load_state_dict(parameters, strict=False, assign=True)
    mismatched = [*outcome.missing_keys, *outcome.unexpected_keys]
    if mismatched:
        raise ImportRefused(f"the quantised weights do not fit config.json ({mismatched[0]} …): quantise it again")
    return cast("PreTrainedModel", model.eval().requires_grad_(False))
