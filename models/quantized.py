"""Weights of 8 and 4 bits: how they are made, kept in a folder and read again. Knows no kernel and no network.

    int8   a scale for each output channel: weight = values * scale
    int4   groups of GROUP weights along the input, a scale and a middle for each: weight = (value - 8) * scale + middle

A quantised folder is a transformers folder in which the weights of linear layers are stored so: NAME.weight holds the
values (int8 [out, in], or uint8 [out, in / 2] with two values a byte, the first one in the upper half), and
NAME.weight_scale the scales ([out] float32, or [in / GROUP, out, 2] bfloat16). MARK says that it is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from models import checkpoint
from models.family import ImportRefused, Precision, Progress

Small = Literal["int8", "int4"]
GROUP = 64
ROWS_AT_ONCE = 256  # they stay in the CPU's caches from one operation to the next
MARK = "quantized.json"
SCALE = "_scale"
HEAD = "lm_head.weight"
NOT_TAKEN = {"model.yaml", "model.safetensors.index.json"}  # written anew


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> int8 of the same shape, and [out] float32 scales."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    for first in range(0, len(weight), ROWS_AT_ONCE):
        rows = weight[first : first + ROWS_AT_ONCE].to(torch.float32, copy=True)
        largest = rows.abs().amax(dim=1).div_(127).clamp_(min=1e-12)
        scale[first : first + ROWS_AT_ONCE] = largest
        values[first : first + ROWS_AT_ONCE] = rows.div_(largest[:, None]).round_().clamp_(-127, 127)
    return values, scale


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> [out, in / 2] uint8, and [in / GROUP, out, 2] bfloat16: scale and middle of each group."""
    rows, columns = weight.shape
    values = torch.empty((rows, columns // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((rows, columns // GROUP, 2), dtype=torch.bfloat16, device=weight.device)
    for first in range(0, rows, ROWS_AT_ONCE):
        groups = weight[first : first + ROWS_AT_ONCE].to(torch.float32, copy=True).unflatten(1, (-1, GROUP))
        low, high = groups.aminmax(dim=2)
        scale = ((high - low) / 15).clamp(min=1e-12)
        levels = groups.sub_(low[..., None]).div_(scale[..., None]).round_().clamp_(0, 15).to(torch.uint8).flatten(1)
        values[first : first + ROWS_AT_ONCE] = levels[:, ::2] << 4 | levels[:, 1::2]
        scales[first : first + ROWS_AT_ONCE] = torch.stack((scale, low + 8 * scale), dim=-1)
    return values, scales.transpose(0, 1).contiguous()


def unpack_groups(values: Tensor) -> Tensor:
    """[out, in / 2] uint8 -> [out, in] uint8, the values 0 to 15."""
    return torch.stack((values >> 4, values & 15), dim=-1).flatten(1)


def widen_groups(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that `quantize_groups` stands for, [out, in]."""
    levels = unpack_groups(values).unflatten(1, (-1, GROUP))
    scale, middle = scales.to(dtype).transpose(0, 1).unbind(dim=-1)
    weight: Tensor = (levels.to(dtype) - 8) * scale[..., None] + middle[..., None]
    return weight.flatten(1)


def quantize(weight: Tensor, precision: Small) -> tuple[Tensor, Tensor]:
    """Values and scales in `precision`; in int8 where the input does not divide into groups."""
    is_grouped = precision == "int4" and weight.shape[1] % GROUP == 0
    return quantize_groups(weight) if is_grouped else quantize_rows(weight)


class QuantizedLinear(nn.Module):
    """A linear layer's weights as they are stored, until a kernel takes them. Cannot compute."""

    def __init__(self, values: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.values, self.scale, self.bias = values, scale, bias
        self.precision: Small = "int8" if values.dtype == torch.int8 else "int4"
        self.in_features = values.shape[1] * (1 if self.precision == "int8" else 2)
        self.out_features = len(values)

    @classmethod
    def of(cls, linear: nn.Linear, precision: Small) -> QuantizedLinear:
        """Quantise a layer, see `quantize`."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(*quantize(linear.weight.detach(), precision), bias)

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def widened(self) -> nn.Linear:
        """The float32 layer that these values stand for, where they are."""
        if self.precision == "int8":
            weight = self.values.float() * self.scale[:, None]
        else:
            weight = widen_groups(self.values, self.scale, torch.float32)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.float(), requires_grad=False)
        return linear

    def reordered(self, order: Tensor) -> QuantizedLinear:
        """The same layer with other output channels first."""
        bias = None if self.bias is None else self.bias[order]
        scale = self.scale[order] if self.precision == "int8" else self.scale[:, order]
        return QuantizedLinear(self.values[order], scale, bias)


def joined(parts: list[QuantizedLinear]) -> QuantizedLinear:
    """Several products of one input as one."""
    scale = torch.cat([part.scale for part in parts], dim=0 if parts[0].precision == "int8" else 1)
    biases = [part.bias for part in parts if part.bias is not None]
    return QuantizedLinear(torch.cat([part.values for part in parts]), scale, torch.cat(biases) if biases else None)


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
