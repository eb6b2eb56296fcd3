"""Linear layers with int8 and int4 weights on CUDA: `kernels.linears_triton`, and a fallback without Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.precision import Precision
from kernels.quantization import QuantizedLinear


def compute_dtype(device: torch.device) -> torch.dtype:
    """The type of activations beside quantised weights: the one that the GPU multiplies."""
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return torch.bfloat16 if has_bfloat16 else torch.float16


class TritonLinear(nn.Module):
    """8-bit activations times int8 or int4 weights."""

    def __init__(self, linear: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        from kernels import linears_triton  # Triton comes with torch's CUDA wheels only

        self._product = linears_triton.product
        self._weight = linears_triton.pack(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return self._product(x.reshape(-1, x.shape[-1]), self._weight).view(*x.shape[:-1], -1)


class DequantizingLinear(nn.Module):
    """The fallback: weights stay quantised in memory and are dequantised at each use, slower than 16 bits."""

    def __init__(self, linear: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self._linear = linear
        self._bias = None if linear.bias is None else linear.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return functional.linear(x, self._linear.weight.dequantized().to(x.dtype), self._bias)


VARIANTS: dict[Precision, tuple[Callable[[Any, torch.dtype], nn.Module], ...]] = {
    "int8": (TritonLinear, DequantizingLinear),
    "int4": (TritonLinear, DequantizingLinear),
}
