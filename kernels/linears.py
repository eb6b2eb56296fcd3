"""The fastest linear layer for a device and a precision: weights are packed once, at load. Knows no network.

On a CPU the weights' format decides the speed, because every token reads all of them:

    float32   oneDNN's blocked layout, float32 arithmetic
    bfloat16  oneDNN's blocked layout where the CPU multiplies bfloat16; else like float16
    float16   FBGEMM's packed half-precision weights, float32 arithmetic
    int8      FBGEMM's int8 weights, a scale for each output channel; activations in 8 bits, a scale for each token
    int4      groups of GROUP weights with a scale and an offset; the head stays int8

Every kernel is tried on a small product before it is used; a CPU that lacks one gets `torch.nn.functional.linear`.
models/linears_cuda.py has int8 and int4 for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels import linears_cuda
from kernels.precision import Precision, Progress, UnsupportedPrecision
from kernels.quantization import GROUP, QuantizedLinear, unpack_groups

MAX_PACKING = 4  # layers packed at once; more would hold too much of the model twice
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3, "int8": 5e-2, "int4": 0.2}
ops = cast("Any", torch.ops)


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of activations."""
    if device.type != "cpu":
        if precision in ("int8", "int4"):
            return linears_cuda.compute_dtype(device)
        return torch.float16 if precision == "float16" else torch.float32 if precision == "float32" else torch.bfloat16
    return torch.bfloat16 if precision == "bfloat16" and has_bfloat16_kernels() else torch.float32


def storage_dtype(precision: Precision, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The type to read weights as before they are packed: never wider than it helps. `stored`: as they are on disk."""
    if precision == "float32":
        return torch.float32
    if device.type != "cpu" or (precision == "bfloat16" and has_bfloat16_kernels()):
        return compute_dtype(precision, device)
    return stored if stored.itemsize == 2 else torch.float16


@torch.inference_mode()
def pack(model: nn.Module, precision: Precision, device: torch.device, progress: Progress) -> None:
    """Replace every linear layer of `model`, a few at a time, so that no more than those are held twice.

    Packing is one thread's work for each layer, so each core takes a layer of its own.
    What is not a linear layer gets the compute type; embeddings stay as they are stored and are widened by the row.
    """
    if device.type != "cpu":
        if precision in ("int8", "int4"):
            if device.type != "cuda":
                raise UnsupportedPrecision(f"{precision} weights are for CPUs and CUDA; on {device.type} use float16")
            linears_cuda.pack(model, precision, device, progress)
        return
    dtype = compute_dtype(precision, device)
    found: list[tuple[nn.Module, str, nn.Module]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear | nn.Embedding | QuantizedLinear)
    ]
    total = sum(_num_bytes(child) for _, _, child in found)
    done = 0
    with ThreadPoolExecutor(min(torch.get_num_threads(), MAX_PACKING)) as pool:
        while found:
            few, found = found[:MAX_PACKING], found[MAX_PACKING:]
            packed = list(pool.map(lambda place: _packed_child(place[1], place[2], precision, dtype), few))
            for (parent, name, child), new in zip(few, packed, strict=True):
                done += _num_bytes(child)
                setattr(parent, name, new)
            progress(done, total, f"packing {precision}")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _num_bytes(layer: nn.Module) -> int:
    if isinstance(layer, QuantizedLinear):
        return layer.num_bytes
    return cast("nn.Linear | nn.Embedding", layer).weight.nbytes


@torch.inference_mode()
def _packed_child(name: str, child: nn.Module, precision: Precision, dtype: torch.dtype) -> nn.Module:
    if isinstance(child, nn.Embedding):
        return StoredEmbedding(child, dtype)
    kind: Precision = "int8" if precision == "int4" and name == "lm_head" else precision
    return packed_linear(cast("nn.Linear | QuantizedLinear", child), kind)


def packed_linear(linear: nn.Linear | QuantizedLinear, precision: Precision) -> nn.Module:
    """One layer in its fastest form here; the float32 original only where the CPU has no kernel for the format."""
    if precision == "bfloat16" and not has_bfloat16_kernels():
        precision = "float16"
    if precision in ("int8", "int4"):
        if not isinstance(linear, QuantizedLinear):
            linear = QuantizedLinear.of(linear, precision)
        return SMALL_KERNELS[linear.precision](linear) if works_here(linear.precision) else linear.widened()
    assert not isinstance(linear, QuantizedLinear), "opened in the precision that it is stored in"
    if not works_here(precision):
        return linear.to(compute_dtype(precision, torch.device("cpu")))
    return KERNELS[precision](linear)


class StoredEmbedding(nn.Module):
    """Looks rows up in the stored type and widens only those."""

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
    """float16 weights, read once and widened in registers; float32 in and out."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach().float()
        self._packed = ops.quantized.linear_prepack_fp16(linear.weight.detach().float().contiguous(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return cast("Tensor", ops.quantized.linear_dynamic_fp16(x, self._packed))


class Int8Linear(nn.Module):
    """int8 weights with a scale for each output channel.

    Every token is scaled by its own largest value before the product and back after it: with one scale for the batch,
    as torch's dynamic quantisation has it, a neighbour's outlier would ruin the answer.
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        zeros = torch.zeros(linear.out_features, dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(linear.values, linear.scale.double(), zeros, 0)
        self._packed = ops.quantized.linear_prepack(quantized, None)
        self._bias = None if linear.bias is None else linear.bias.float()
        # without VNNI the kernel adds pairs of products in 16 bits: seven bits of activation cannot overflow them
        self._levels = 127 if has_vnni() else 63

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
        product = ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / largest, 1.0 / self._levels, self._levels + 1, self._packed
        )
        product *= largest
        return cast("Tensor", product if self._bias is None else product.add_(self._bias))


class Int4Linear(nn.Module):
    """int4 weights in groups of GROUP along the input, each with a scale and an offset."""

    def __init__(self, linear: QuantizedLinear) -> None:
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


KERNELS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "float32": lambda linear: OneDnnLinear(linear, torch.float32),
    "bfloat16": lambda linear: OneDnnLinear(linear, torch.bfloat16),
    "float16": HalfWeightLinear,
}
SMALL_KERNELS: dict[str, Callable[[QuantizedLinear], nn.Module]] = {"int8": Int8Linear, "int4": Int4Linear}


@cache
@torch.inference_mode()
def works_here(precision: Precision) -> bool:
    """Whether this machine's kernel for a format exists and gives the right product."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(2 * GROUP, 96, bias=True)
    linear.weight.copy_(torch.randn(96, 2 * GROUP, generator=generator))
    x = torch.randn(1, 3, 2 * GROUP, generator=generator)
    expected = linear(x)
    try:
        if precision in ("int8", "int4"):
            packed = SMALL_KERNELS[precision](QuantizedLinear.of(linear, precision))
        else:
            packed = KERNELS[precision](linear)
        error = packed(x.to(dtype)).float() - expected
    except (RuntimeError, AttributeError, NotImplementedError):
        return False  # an operator that this build of torch or this CPU does not have
    return bool(error.norm() <= TOLERANCE[precision] * expected.norm())


@cache
def has_bfloat16_kernels() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware, and oneDNN packs them."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16")) and works_here("bfloat16")


@cache
def has_vnni() -> bool:
    """Whether 8-bit products are added up in 32 bits."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_vnni") or found.get("amx_int8"))
