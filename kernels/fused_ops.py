"""The operations between a decoder layer's products: rotary embedding, SwiGLU, RMSNorm, int8 activations.

On a GPU `torch.compile` makes one kernel of each. With CUDA graphs, which remove the launches' cost, such an operation
still costs its own reads and writes and a gap of a microsecond or two; a layer of a six-billion-parameter model has a
dozen of them. torch.compile needs Triton, which comes with torch's CUDA wheels, and a C compiler; where it fails, the
operations run as they are written here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

logger = logging.getLogger(__name__)


def rotate_real(heads: Tensor, rotations: Tensor) -> None:
    """`rotate` in real numbers, which compilers support. rotations: [rows, 1, rotated / 2, 2] float32, (cos, sin)."""
    real, imaginary = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotations.unbind(-1)
    rotated = torch.stack((real * cosine - imaginary * sine, imaginary * cosine + real * sine), dim=-1)
    heads.copy_(rotated.flatten(-2))


def rotate(heads: Tensor, rotations: Tensor) -> None:
    """Rotate neighbouring channels (0,1), (2,3)… in place, as complex numbers.

    heads: [rows, heads, rotated]; rotations: [rows, 1, rotated / 2] complex64.
    """
    if heads.dtype == torch.float32:
        torch.view_as_complex(heads.unflatten(-1, (-1, 2))).mul_(rotations)
        return
    rotated = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2))) * rotations
    heads.copy_(torch.view_as_real(rotated).flatten(-2))


def swiglu(gate_up: Tensor) -> Tensor:
    """[rows, 2 * inner] -> [rows, inner]"""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension, the mean in float32. Same shape and type.

    On a CPU torch's own makes eight passes with as many temporary tensors: 20 times slower at 512 rows of 4,096.
    """
    if hidden.device.type != "cpu":
        return functional.rms_norm(hidden, hidden.shape[-1:], weight, epsilon)
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
    normed: Tensor = (hidden * scale).mul_(weight).to(hidden.dtype)
    return normed


def add_rms_norm(hidden: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(hidden + delta, its RMSNorm), both [rows, hidden_size]."""
    total = hidden + delta
    return total, rms_norm(total, weight, epsilon)


def quantize_activations(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, inputs] -> int8 of the same shape, and [rows, 1] float32 scales: rows = values * scale."""
    rows = rows.float()
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    return (rows / scale).round().to(torch.int8), scale


def dequantize_product(product: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """[rows, outputs] int32 -> float32: times the scales of its row and its output, plus the bias."""
    return product.float() * row_scale * scale + bias


@dataclass(frozen=True)
class FusedOps:
    """One implementation of the functions of the same names."""

    rotate: Callable[[Tensor, Tensor], None]
    swiglu: Callable[[Tensor], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    quantize_activations: Callable[[Tensor], tuple[Tensor, Tensor]]
    dequantize_product: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


EAGER = FusedOps(rotate, swiglu, add_rms_norm, quantize_activations, dequantize_product)


def compile_with(compiler: Callable[[Any], Any]) -> FusedOps:
    """The operations after `compiler` (torch.compile)."""
    compiled_rotate = compiler(rotate_real)
    return FusedOps(
        rotate=lambda heads, rotations: compiled_rotate(heads, torch.view_as_real(rotations)),
        swiglu=compiler(swiglu),
        add_rms_norm=compiler(add_rms_norm),
        quantize_activations=compiler(quantize_activations),
        dequantize_product=compiler(dequantize_product),
    )


@torch.inference_mode()
def compiled(device: torch.device, dtype: torch.dtype) -> FusedOps:
    """Compiled for any number of rows; the eager ones if compiling fails or gives other numbers. Takes seconds."""
    ops = compile_with(lambda function: torch.compile(function, dynamic=True))
    try:
        is_equal = all(agrees_with_eager(ops, device, dtype, rows) for rows in (1, 5, 64))
    except Exception as error:  # noqa: BLE001
        # torch.compile documents no exception types
        logger.warning("torch.compile failed, fused operations run eagerly: %s", str(error).partition("\n")[0])
        return EAGER
    return ops if is_equal else EAGER


def agrees_with_eager(ops: FusedOps, device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether `ops` computes what EAGER does, within a few units of the type's last place."""
    generator = torch.Generator().manual_seed(rows)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    heads, gate_up, hidden, delta = random(rows, 6, 32), random(rows, 64), random(rows, 32), random(rows, 32)
    weight = random(32)
    rotations = torch.view_as_complex(torch.randn(rows, 1, 8, 2, generator=generator).to(device))
    rotated, expected = heads.clone(), heads.clone()
    ops.rotate(rotated[:, :4, :16], rotations)
    EAGER.rotate(expected[:, :4, :16], rotations)
    pairs = [
        (rotated, expected),
        (ops.swiglu(gate_up), EAGER.swiglu(gate_up)),
        *zip(
            ops.add_rms_norm(hidden, delta, weight, 1e-5), EAGER.add_rms_norm(hidden, delta, weight, 1e-5), strict=True
        ),
    ]
    values, scale = ops.quantize_activations(hidden)
    if not torch.allclose(values * scale, hidden.float(), atol=float(scale.max())):
        return False
    product = (values.int() * 1000, scale, weight.float(), weight.float())
    pairs.append((ops.dequantize_product(*product), EAGER.dequantize_product(*product)))
    tolerance = 8 * torch.finfo(dtype).eps
    return all(torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance) for a, b in pairs)
