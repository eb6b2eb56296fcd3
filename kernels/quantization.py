"""float weights -> int8 or int4 values with scales, and back; `kernels.layouts.Format` names the formats.

int8   a bfloat16 scale for each output channel and group of GROUP inputs: weight = value * scale
int4   the same, or with a middle: weight = value * scale + middle
rows   as ChatGLM's own int8 and int4 checkpoints: one float32 scale for each output channel
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kernels.layouts import GROUP, INT8_FORMATS, Format, QuantizedWeight
from kernels.layouts import concatenate as concatenate_weights
from kernels.precision import QuantizedPrecision

CHUNK_ROWS = 256  # small enough to stay in the CPU's caches from one operation to the next
Bits = Literal[4, 8]


def quantize_rows(weight: Tensor, bits: Bits) -> QuantizedWeight:
    """[out, in] -> values with a scale for each row."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    largest = 2 ** (bits - 1) - 1
    for first in range(0, len(weight), CHUNK_ROWS):
        rows = weight[first : first + CHUNK_ROWS].to(torch.float32, copy=True)
        scale = rows.abs().amax(dim=1).div_(largest).clamp_(min=1e-12)
        scales[first : first + CHUNK_ROWS] = scale
        values[first : first + CHUNK_ROWS] = rows.div_(scale[:, None]).round_().clamp_(-largest, largest)
    return QuantizedWeight(Format.INT8_ROW if bits == 8 else Format.INT4_ROW, values, scales)


def quantize_groups(weight: Tensor, bits: Bits, has_middle: bool = False) -> QuantizedWeight:
    """[out, in] -> values with a scale for each group of GROUP inputs. With a middle, 4 bits only."""
    num_rows, num_inputs = weight.shape
    num_groups = -(-num_inputs // GROUP)
    values = torch.empty((num_rows, num_groups * GROUP), dtype=torch.int8, device=weight.device)
    scales = torch.empty((num_rows, num_groups), dtype=torch.bfloat16, device=weight.device)
    middles = torch.empty_like(scales) if has_middle else None
    for first in range(0, num_rows, CHUNK_ROWS):
        chunk = slice(first, first + CHUNK_ROWS)
        rows = weight[chunk].to(torch.float32, copy=True)
        groups = nn.functional.pad(rows, (0, num_groups * GROUP - num_inputs)).unflatten(1, (-1, GROUP))
        if middles is not None:
            low, high = groups.aminmax(dim=2)
            scale = ((high - low) / 15).clamp(min=1e-12).bfloat16()
            middle = (low + 8 * scale.float()).bfloat16()
            middles[chunk] = middle
            rounded = ((groups - middle.float()[..., None]) / scale.float()[..., None]).round_().clamp_(-8, 7)
        elif bits == 8:
            scale = (groups.abs().amax(dim=2) / 127).clamp(min=1e-12).bfloat16()
            rounded = (groups / scale.float()[..., None]).round_().clamp_(-127, 127)
        else:
            scale, rounded = _rounded_to_4_bits(groups)
        scales[chunk], values[chunk] = scale, rounded.flatten(1).to(torch.int8)
    format = Format.INT8 if bits == 8 else Format.INT4 if middles is None else Format.INT4_MIDDLE
    return QuantizedWeight(format, values[:, :num_inputs].contiguous(), scales, middles)


def _rounded_to_4_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    """groups: [rows, groups, GROUP] -> bfloat16 scales [rows, groups] and values -8 to 7, the least squared error among
    a few scales. The value of largest magnitude becomes -8 or a little less, since there are eight negative values and
    seven positive ones."""
    index = groups.abs().argmax(dim=2, keepdim=True)
    extreme = groups.gather(2, index).squeeze(2)
    best_error = torch.full_like(extreme, float("inf"))
    best_scale, best_values = torch.zeros_like(extreme).bfloat16(), torch.zeros_like(groups)
    for steps in (-8.0, -7.4, -6.8, 7.0):
        scale = (extreme / steps).bfloat16()
        divisor = torch.where(scale == 0, 1.0, scale.float())[..., None]
        values = (groups / divisor).round_().clamp_(-8, 7)
        error = (values * divisor - groups).square().sum(dim=2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_values = torch.where(better[..., None], values, best_values)
    return best_scale, best_values


def quantize(weight: Tensor, precision: QuantizedPrecision) -> QuantizedWeight:
    """What each precision means for new weights."""
    return quantize_groups(weight, 8 if precision == "int8" else 4)


def pack_nibbles(values: Tensor) -> Tensor:
    """[out, in] int8, -8 to 7 -> [out, in / 2 (rounded up)] uint8, the first of each pair in the upper half."""
    unsigned = nn.functional.pad((values + 8).byte(), (0, values.shape[1] % 2))
    return unsigned[:, ::2] << 4 | unsigned[:, 1::2]


def unpack_nibbles(packed: Tensor, num_inputs: int) -> Tensor:
    """The inverse of `pack_nibbles`: [out, num_inputs] int8."""
    both = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)[:, :num_inputs]
    return (both.to(torch.int8) - 8).contiguous()


class QuantizedLinear(nn.Module):
    """The quantised weights of a linear layer, as they are stored. Has no forward: a kernel is made of it."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.values.shape

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, precision: QuantizedPrecision, device: torch.device | None = None
    ) -> QuantizedLinear:
        """Quantise a layer on `device`, by default where it is; see `quantize`."""
        device = device or linear.weight.device
        bias = None if linear.bias is None else linear.bias.detach().to(device)
        return cls(quantize(linear.weight.detach().to(device), precision), bias)

    @property
    def precision(self) -> QuantizedPrecision:
        return "int8" if self.weight.format in INT8_FORMATS else "int4"

    @property
    def num_bytes(self) -> int:
        bits = 8 if self.precision == "int8" else 4
        return self.weight.values.numel() * bits // 8 + self.weight.scale.nbytes

    def moved(self, device: torch.device) -> QuantizedLinear:
        """The same layer on another device."""
        weight = self.weight
        middle = None if weight.middle is None else weight.middle.to(device)
        moved = QuantizedWeight(weight.format, weight.values.to(device), weight.scale.to(device), middle)
        return QuantizedLinear(moved, None if self.bias is None else self.bias.to(device))

    def dequantized(self) -> nn.Linear:
        """The float32 layer that these values stand for, on their device."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.dequantized(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.float(), requires_grad=False)
        return linear

    def reordered(self, order: Tensor) -> QuantizedLinear:
        """The same layer with its output channels in another order."""
        return QuantizedLinear(self.weight.reordered(order), None if self.bias is None else self.bias[order])


def concatenate(layers: list[QuantizedLinear]) -> QuantizedLinear:
    """One layer that has the outputs of several layers with the same inputs and format."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    weight = concatenate_weights([layer.weight for layer in layers])
    return QuantizedLinear(weight, torch.cat(biases) if biases else None)
