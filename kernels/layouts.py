"""Weights of a linear layer -> the bytes that the native kernels read, and back.

One layout serves every instruction set, so that a packed file can be mapped on any CPU: blocks of 16 output channels,
inputs padded with zeros to a multiple of GROUP. kernels/native/linear.h describes the formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import cast

import torch
from torch import Tensor

GROUP = 32  # inputs that share a scale
OUTPUTS = 16  # channels of a block
LAYOUT_VERSION = 1  # increase it when the bytes of a packed weight change


class Format(IntEnum):
    """How a weight is stored; the numbers of `enum linear_format` in kernels/native/linear.h."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    INT8 = 3  # a bfloat16 scale for each output and group of inputs
    INT8_ROW = 4  # a float32 scale for each output
    INT4 = 5
    INT4_ROW = 6
    INT4_MIDDLE = 7  # weight = value * scale + middle


FLOAT_FORMATS = {torch.float32: Format.FLOAT32, torch.bfloat16: Format.BFLOAT16, torch.float16: Format.FLOAT16}
DTYPES = {format: dtype for dtype, format in FLOAT_FORMATS.items()}
BY_ROW = (Format.INT8_ROW, Format.INT4_ROW)
INT8_FORMATS, INT4_FORMATS = (Format.INT8, Format.INT8_ROW), (Format.INT4, Format.INT4_ROW, Format.INT4_MIDDLE)


@dataclass(frozen=True)
class PackedLinear:
    """The weights of one layer as the kernels read them; the tensors may be mapped from a file."""

    format: Format
    outputs: int
    inputs: int
    weights: Tensor  # uint8, flat
    scales: Tensor | None  # uint8, flat
    bias: Tensor | None  # float32, [outputs, padded to OUTPUTS]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.weights, self.scales, self.bias) if tensor is not None)


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer values with scales, before they are packed. weight = value * scale (+ middle)."""

    format: Format
    values: Tensor  # [outputs, inputs] int8: -127 to 127, or -8 to 7
    scale: Tensor  # [outputs] float32, or [outputs, groups] bfloat16
    middle: Tensor | None = None  # [outputs, groups] bfloat16

    def dequantized(self) -> Tensor:
        """[outputs, inputs] float32."""
        values: Tensor = self.values.float()
        if self.format in BY_ROW:
            return values * self.scale[:, None]
        inputs = values.shape[1]
        values = _pad(values, 1, GROUP, 0).unflatten(1, (-1, GROUP)) * self.scale.float()[..., None]
        if self.middle is not None:
            values = values + self.middle.float()[..., None]
        return values.flatten(1)[:, :inputs]

    def reordered(self, order: Tensor) -> QuantizedWeight:
        """The same weight with its output channels in another order."""
        middle = None if self.middle is None else self.middle[order]
        return QuantizedWeight(self.format, self.values[order], self.scale[order], middle)


def concatenate(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """One weight that has the outputs of several weights with the same inputs and format."""
    first = weights[0]
    middles = [weight.middle for weight in weights if weight.middle is not None]
    return QuantizedWeight(
        first.format,
        torch.cat([weight.values for weight in weights]),
        torch.cat([weight.scale for weight in weights]),
        torch.cat(middles) if middles else None,
    )


def pack(weight: Tensor | QuantizedWeight, bias: Tensor | None) -> PackedLinear:
    """weight: [outputs, inputs] in a type of FLOAT_FORMATS, or quantised; bias: [outputs]."""
    scales = None
    if isinstance(weight, Tensor):
        format, values = FLOAT_FORMATS[weight.dtype], weight
        blocks = _blocks(values, 0)  # [n, o, k]
        if format == Format.BFLOAT16:
            packed = blocks.unflatten(2, (-1, 2)).permute(0, 2, 1, 3)
        else:
            packed = blocks.transpose(1, 2)
    else:
        format, values = weight.format, weight.values
        scales = _packed_scales(weight)
        if format in INT8_FORMATS:
            unsigned = (values.view(torch.uint8) ^ 128) if values.is_contiguous() else (values.int() + 128).byte()
            packed = _blocks(unsigned, 128).unflatten(2, (-1, 4)).permute(0, 2, 1, 3)
        else:
            halves = _blocks((values + 8).byte(), 8).unflatten(2, (-1, 2, 4, 4))  # [n, o, g, half, s, 4]
            packed = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).permute(0, 2, 3, 1, 4)
    return PackedLinear(
        format,
        values.shape[0],
        values.shape[1],
        packed.contiguous().view(-1).view(torch.uint8),
        scales,
        None if bias is None else _pad(bias.detach().float(), 0, OUTPUTS, 0).contiguous(),
    )


def unpack(packed: PackedLinear) -> Tensor | QuantizedWeight:
    """The inverse of `pack`, exactly."""
    outputs, inputs, format = packed.outputs, packed.inputs, packed.format
    num_blocks, num_groups = -(-outputs // OUTPUTS), -(-inputs // GROUP)
    if format in DTYPES:
        flat = packed.weights.view(DTYPES[format])
        if format == Format.BFLOAT16:
            blocks = flat.view(num_blocks, -1, OUTPUTS, 2).permute(0, 2, 1, 3).flatten(2)
        else:
            blocks = flat.view(num_blocks, -1, OUTPUTS).transpose(1, 2)
        return blocks.flatten(0, 1)[:outputs, :inputs].contiguous()
    if format in INT8_FORMATS:
        blocks = packed.weights.view(num_blocks, -1, OUTPUTS, 4).permute(0, 2, 1, 3).flatten(2)
        values = (blocks.short() - 128).to(torch.int8)
    else:
        both = packed.weights.view(num_blocks, num_groups, 4, OUTPUTS, 4).permute(0, 3, 1, 2, 4)  # [n, o, g, s, 4]
        values = torch.stack((both & 15, both >> 4), dim=3).flatten(2).to(torch.int8) - 8
    values = values.flatten(0, 1)[:outputs, :inputs].contiguous()
    assert packed.scales is not None
    if format in BY_ROW:
        return QuantizedWeight(format, values, packed.scales.view(torch.float32)[:outputs].clone())
    scales = packed.scales.view(torch.bfloat16)
    if format == Format.INT4_MIDDLE:
        pairs = scales.view(num_blocks, num_groups, 2, OUTPUTS).permute(2, 0, 3, 1).flatten(1, 2)[:, :outputs]
        return QuantizedWeight(format, values, pairs[0].contiguous(), pairs[1].contiguous())
    scale = scales.view(num_blocks, num_groups, OUTPUTS).transpose(1, 2).flatten(0, 1)[:outputs]
    return QuantizedWeight(format, values, scale.contiguous())


def _packed_scales(weight: QuantizedWeight) -> Tensor:
    if weight.format in BY_ROW:
        return _pad(weight.scale.float(), 0, OUTPUTS, 0).contiguous().view(torch.uint8)
    scale = _blocks(weight.scale, 0, multiple=1).transpose(1, 2)  # [n, g, o]
    if weight.format == Format.INT4_MIDDLE:
        middle = _blocks(cast("Tensor", weight.middle), 0, multiple=1).transpose(1, 2)
        scale = torch.stack((scale, middle), dim=2)
    return scale.contiguous().view(-1).view(torch.uint8)


def _blocks(values: Tensor, filling: int, multiple: int = GROUP) -> Tensor:
    """[outputs, inputs] -> [blocks, OUTPUTS, inputs], both padded."""
    padded = _pad(_pad(values, 1, multiple, filling), 0, OUTPUTS, filling)
    return cast("Tensor", padded.unflatten(0, (-1, OUTPUTS)))


def _pad(tensor: Tensor, dimension: int, multiple: int, filling: int) -> Tensor:
    missing = -tensor.shape[dimension] % multiple
    if not missing:
        return tensor
    size = list(tensor.shape)
    size[dimension] = missing
    return torch.cat((tensor, tensor.new_full(size, filling)), dim=dimension)
