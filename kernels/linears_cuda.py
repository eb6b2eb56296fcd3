"""Linear layers with int8 and int4 weights on CUDA, by the operators of the torch wheel.

    int8   a scale for each output channel and one for each token, products by cuBLASLt (`_int_mm`)
    int4   groups of GROUP weights with a scale and an offset, products by tinygemm (`_weight_int4pack_mm`, sm80 and
           newer)

A GPU without one of these operators dequantises the weights at each use: the model fits, and is slower than in 16 bits.
(`_weight_int8pack_mm` has one thread for each output on CUDA and reads every weight once for each token: not used.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.fused_ops import EAGER
from kernels.layouts import BY_ROW, GROUP
from kernels.precision import Precision
from kernels.quantization import QuantizedLinear, pack_nibbles

MIN_ROWS = 32  # `_int_mm` wants more than 16
ops = cast("Any", torch.ops)


def compute_dtype(device: torch.device) -> torch.dtype:
    """The type of activations beside quantised weights: the one that the GPU multiplies."""
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return torch.bfloat16 if has_bfloat16 else torch.float16


class Int8Linear(nn.Module):
    """8-bit weights and, row by row, 8-bit activations, on tensor cores."""

    def __init__(self, linear: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        if linear.weight.format not in BY_ROW:
            raise RuntimeError("cuBLASLt multiplies weights with one scale a row")
        self._scale = linear.weight.scale
        self._values = linear.weight.values.T  # [in, out], column by column: what the kernel takes without a copy
        self._bias = torch.zeros_like(self._scale) if linear.bias is None else linear.bias.float()
        self.fused_ops = EAGER

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        flat = x.reshape(-1, x.shape[-1])
        values, row_scale = self.fused_ops.quantize_activations(flat)
        if len(flat) < MIN_ROWS:
            values = functional.pad(values, (0, 0, 0, MIN_ROWS - len(flat)))
        product = torch._int_mm(values, self._values)[: len(flat)]
        out = self.fused_ops.dequantize_product(product, row_scale, self._scale, self._bias)
        return out.to(x.dtype).view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """4-bit weights in tinygemm's layout, bfloat16 activations."""

    def __init__(self, linear: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        tiles = next(tiles for tiles in (8, 4, 2) if linear.in_features % (16 * tiles) == 0)
        weight = linear.weight
        if weight.format in BY_ROW:
            raise RuntimeError("tinygemm multiplies weights with a scale for each group")
        self._packed = ops.aten._convert_weight_to_int4pack(pack_nibbles(weight.values), tiles)
        middle = torch.zeros_like(weight.scale) if weight.middle is None else weight.middle
        self._scales = torch.stack((weight.scale, middle), dim=-1).transpose(0, 1).contiguous()
        self._bias = None if linear.bias is None else linear.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        flat = x.reshape(-1, x.shape[-1]).bfloat16()
        product = ops.aten._weight_int4pack_mm(flat, self._packed, GROUP, self._scales)
        product = product.to(x.dtype).view(*x.shape[:-1], -1)
        return cast("Tensor", product if self._bias is None else product.add_(self._bias))


class DequantizingLinear(nn.Module):
    """The fallback: weights stay quantised in memory and are dequantised at each use."""

    def __init__(self, linear: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self._linear = linear
        self._bias = None if linear.bias is None else linear.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return functional.linear(x, self._linear.weight.dequantized().to(x.dtype), self._bias)


VARIANTS: dict[Precision, tuple[Callable[[Any, torch.dtype], nn.Module], ...]] = {
    "int8": (Int8Linear, DequantizingLinear),
    "int4": (Int4Linear, DequantizingLinear),
}
