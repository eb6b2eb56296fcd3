"""Linear layers on CPUs, for each precision. The weights' format decides the speed: every token reads all of them.

The compiled kernels (`linears_native`) come first: float32 activations, weights in their own format. The others are for
machines without a C compiler, and slower:

float32, bfloat16  oneDNN's blocked layout; bfloat16 on CPUs that multiply it, others use float16
float16            FBGEMM's packed half-precision weights, float32 arithmetic
int8               as 16-bit weights: twice the memory
int4               torch's operator for groups, where it has the format; else as int8
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from kernels.layouts import GROUP, INT4_FORMATS, Format, pack
from kernels.linears_native import NativeLinear
from kernels.precision import Precision
from kernels.quantization import QuantizedLinear

ops = cast("Any", torch.ops)


def native_linear(linear: nn.Linear | QuantizedLinear, dtype: torch.dtype) -> nn.Module:
    """Weights in their own format. Raises RuntimeError without compiled kernels."""
    weight = linear.weight if isinstance(linear, QuantizedLinear) else linear.weight.detach()
    return NativeLinear(pack(weight, linear.bias))


def native_in(stored: torch.dtype) -> Callable[[nn.Linear, torch.dtype], nn.Module]:
    """Weights in `stored`, whatever they are now."""

    def make(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
        return NativeLinear(pack(linear.weight.detach().to(stored), linear.bias))

    return make


class OneDnnLinear(nn.Module):
    """float32 or bfloat16 weights in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self._weight = ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype).contiguous(), None)
        self._bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return cast("Tensor", ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], ""))


class HalfWeightLinear(nn.Module):
    """float16 weights, converted in registers; float32 in and out."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach().float()
        self._packed = ops.quantized.linear_prepack_fp16(linear.weight.detach().float().contiguous(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return cast("Tensor", ops.quantized.linear_dynamic_fp16(x, self._packed))


class Int4Linear(nn.Module):
    """int4 weights with a scale for each group, by torch's operator."""

    def __init__(self, linear: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        weight = linear.weight
        if weight.format not in INT4_FORMATS or weight.format == Format.INT4_ROW or linear.in_features % GROUP:
            raise RuntimeError("torch's operator does not have this format")
        self._packed = ops.aten._convert_weight_to_int4pack_for_cpu((weight.values + 8).int(), 1)
        middle = torch.zeros_like(weight.scale) if weight.middle is None else weight.middle
        self._scales = torch.stack((weight.scale, middle), dim=-1).transpose(0, 1).contiguous()
        self._bias = None if linear.bias is None else linear.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        flat = x.reshape(-1, x.shape[-1]).bfloat16()
        product = ops.aten._weight_int4pack_mm_for_cpu(flat, self._packed, GROUP, self._scales)
        product = product.view(*x.shape[:-1], -1).to(x.dtype)
        return cast("Tensor", product if self._bias is None else product.add_(self._bias))


def half_weights(linear: QuantizedLinear, dtype: torch.dtype) -> nn.Module:
    """The fallback for quantised weights: 16 bits."""
    dequantized = linear.dequantized()
    return OneDnnLinear(dequantized, dtype) if dtype == torch.bfloat16 else HalfWeightLinear(dequantized, dtype)


def torch_linear(linear: nn.Linear | QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    """The last fallback: torch's own layer, in the type of the activations."""
    return (linear.dequantized() if isinstance(linear, QuantizedLinear) else linear).to(dtype)


VARIANTS: dict[Precision, tuple[Callable[[Any, torch.dtype], nn.Module], ...]] = {
    "float32": (native_in(torch.float32), OneDnnLinear, torch_linear),
    "bfloat16": (native_in(torch.bfloat16), OneDnnLinear, torch_linear),
    "float16": (native_in(torch.float16), HalfWeightLinear, torch_linear),
    "int8": (native_linear, half_weights, torch_linear),
    "int4": (native_linear, Int4Linear, half_weights, torch_linear),
}
