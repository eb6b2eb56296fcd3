"""float weights -> int8 or int4 values with scales, and back.

int8   a scale for each output channel: weight = values * scale
int4   groups of GROUP weights along the input, a scale and a middle for each: weight = (value - 8) * scale + middle
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Small = Literal["int8", "int4"]
GROUP = 64
ROWS_AT_ONCE = 256  # they stay in the CPU's caches from one operation to the next


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
