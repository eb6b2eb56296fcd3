"""Linear layers on CPUs, for each precision. The weights' format decides the speed: every token reads all of them.

float32   oneDNN's blocked layout, float32 arithmetic
bfloat16  oneDNN's blocked layout, on CPUs that multiply bfloat16; other CPUs use float16
float16   FBGEMM's packed half-precision weights, float32 arithmetic
int8      FBGEMM's int8 weights, a scale for each output channel; activations in 8 bits, a scale for each token
int4      groups of GROUP weights with a scale and an offset
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.precision import Precision
from kernels.quantization import GROUP, QuantizedLinear, unpack_groups

ops = cast("Any", torch.ops)


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


class Int8Linear(nn.Module):
    """int8 weights with a scale for each output channel.

    Each row is divided by its own largest value before the product and multiplied after it: with one scale for the
    batch, as torch's dynamic quantisation has it, an outlier in one row would ruin the others.
    """

    def __init__(self, linear: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        zeros = torch.zeros(linear.out_features, dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(linear.values, linear.scale.double(), zeros, 0)
        self._packed = ops.quantized.linear_prepack(quantized, None)
        self._bias = None if linear.bias is None else linear.bias.float()
        # without VNNI the kernel adds pairs of products in 16 bits: seven bits of activation cannot overflow them
        self._max_value = 127 if has_vnni() else 63

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
        product = ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / largest, 1.0 / self._max_value, self._max_value + 1, self._packed
        )
        product *= largest
        return cast("Tensor", product if self._bias is None else product.add_(self._bias))


class Int4Linear(nn.Module):
    """int4 weights in groups of GROUP along the input, each with a scale and an offset."""

    def __init__(self, linear: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self._packed = ops.aten._convert_weight_to_int4pack_for_cpu(unpack_groups(linear.values).int(), 1)
        self._scales = linear.scale.clone()
        self._bias = None if linear.bias is None else linear.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        flat = x.reshape(-1, x.shape[-1]).bfloat16()
        product = ops.aten._weight_int4pack_mm_for_cpu(flat, self._packed, GROUP, self._scales)
        product = product.view(*x.shape[:-1], -1).to(x.dtype)
        return cast("Tensor", product if self._bias is None else product.add_(self._bias))


class StoredEmbedding(nn.Module):
    """An embedding in its stored type; only the rows that are looked up are converted."""

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self._table = embedding.weight.detach()  # no parameter: it keeps its type when the rest is cast
        self._dtype = dtype

    @property
    def weight(self) -> Tensor:
        return self._table

    def forward(self, token_ids: Tensor) -> Tensor:
        """[...] int64 -> [..., hidden]"""
        return functional.embedding(token_ids, self._table).to(self._dtype)


def torch_linear(linear: nn.Linear | QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    """The fallback: torch's own layer, in the type of the activations."""
    return (linear.dequantized() if isinstance(linear, QuantizedLinear) else linear).to(dtype)


VARIANTS: dict[Precision, tuple[Callable[[Any, torch.dtype], nn.Module], ...]] = {
    "float32": (OneDnnLinear, torch_linear),
    "bfloat16": (OneDnnLinear, torch_linear),
    "float16": (HalfWeightLinear, torch_linear),
    "int8": (Int8Linear, torch_linear),
    "int4": (Int4Linear, torch_linear),
}


@cache
def has_vnni() -> bool:
    """Whether products of 8-bit numbers are summed in 32 bits."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_vnni") or found.get("amx_int8"))
