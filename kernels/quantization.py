"""float weights -> int8 or int4 values with scales, and back.

int8   a scale for each output channel: weight = value * scale
int4   groups of GROUP weights along the input, a scale and an offset for each: weight = (value - 8) * scale + offset
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.precision import QuantizedPrecision

GROUP = 64
CHUNK_ROWS = 256  # small enough to stay in the CPU's caches from one operation to the next


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> int8 of the same shape, and [out] float32 scales."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), device=weight.device)
    for first in range(0, len(weight), CHUNK_ROWS):
        rows = weight[first : first + CHUNK_ROWS].to(torch.float32, copy=True)
        scale = rows.abs().amax(dim=1).div_(127).clamp_(min=1e-12)
        scales[first : first + CHUNK_ROWS] = scale
        values[first : first + CHUNK_ROWS] = rows.div_(scale[:, None]).round_().clamp_(-127, 127)
    return values, scales


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> [out, in / 2] uint8, and [in / GROUP, out, 2] bfloat16: scale and offset of each group."""
    num_rows, num_columns = weight.shape
    packed = torch.empty((num_rows, num_columns // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((num_rows, num_columns // GROUP, 2), dtype=torch.bfloat16, device=weight.device)
    for first in range(0, num_rows, CHUNK_ROWS):
        groups = weight[first : first + CHUNK_ROWS].to(torch.float32, copy=True).unflatten(1, (-1, GROUP))
        low, high = groups.aminmax(dim=2)
        scale = ((high - low) / 15).clamp(min=1e-12)
        values = groups.sub_(low[..., None]).div_(scale[..., None]).round_().clamp_(0, 15).to(torch.uint8).flatten(1)
        packed[first : first + CHUNK_ROWS] = values[:, ::2] << 4 | values[:, 1::2]
        scales[first : first + CHUNK_ROWS] = torch.stack((scale, low + 8 * scale), dim=-1)
    return packed, scales.transpose(0, 1).contiguous()


def unpack_groups(packed: Tensor) -> Tensor:
    """[out, in / 2] uint8 -> [out, in] uint8, the values 0 to 15."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)


def dequantize_groups(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_groups`: the weights as [out, in]."""
    values = unpack_groups(packed).unflatten(1, (-1, GROUP))
    scale, offset = scales.to(dtype).transpose(0, 1).unbind(dim=-1)
    weight: Tensor = (values.to(dtype) - 8) * scale[..., None] + offset[..., None]
    return weight.flatten(1)


def quantize(weight: Tensor, precision: QuantizedPrecision) -> tuple[Tensor, Tensor]:
    """Values and scales in `precision`; in int8 where the input does not divide into groups."""
    is_grouped = precision == "int4" and weight.shape[1] % GROUP == 0
    return quantize_groups(weight) if is_grouped else quantize_rows(weight)


class QuantizedLinear(nn.Module):
    """The quantised weights of a linear layer, as they are stored. Has no forward: a kernel is made of it."""

    values: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, values: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        for name, tensor in (("values", values), ("scale", scale), ("bias", bias)):
            self.register_buffer(name, tensor, persistent=False)
        self.precision: QuantizedPrecision = "int8" if values.dtype == torch.int8 else "int4"
        self.in_features = values.shape[1] * (1 if self.precision == "int8" else 2)
        self.out_features = len(values)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, precision: QuantizedPrecision, device: torch.device | None = None
    ) -> QuantizedLinear:
        """Quantise a layer on `device`, by default where it is; see `quantize`."""
        device = device or linear.weight.device
        bias = None if linear.bias is None else linear.bias.detach().to(device)
        return cls(*quantize(linear.weight.detach().to(device), precision), bias)

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def dequantized(self) -> nn.Linear:
        """The float32 layer that these values stand for, on their device."""
        if self.precision == "int8":
            weight = self.values.float() * self.scale[:, None]
        else:
            weight = dequantize_groups(self.values, self.scale, torch.float32)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.float(), requires_grad=False)
        return linear

    def reordered(self, order: Tensor) -> QuantizedLinear:
        """The same layer with its output channels in another order."""
        bias = None if self.bias is None else self.bias[order]
        scale = self.scale[order] if self.precision == "int8" else self.scale[:, order]
        return QuantizedLinear(self.values[order], scale, bias)


def concatenate(layers: list[QuantizedLinear]) -> QuantizedLinear:
    """One layer that has the outputs of several layers with the same input."""
    scale = torch.cat([layer.scale for layer in layers], dim=0 if layers[0].precision == "int8" else 1)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return QuantizedLinear(torch.cat([layer.values for layer in layers]), scale, torch.cat(biases) if biases else None)
