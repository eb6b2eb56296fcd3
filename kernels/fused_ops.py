"""The small operations of a decoder layer: RMSNorm, SwiGLU, the rotary embedding.

EAGER computes them with torch's operators; on a GPU `kernels.ops_triton` has each of them as one kernel. In a decode
step, even of CUDA graphs, which remove the launches' cost, an operation still costs its own reads and writes and a gap
of a microsecond; a layer of a six-billion-parameter model has a dozen of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

logger = logging.getLogger(__name__)


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
    """RMSNorm over the last dimension, the mean in float32. Same shape, the type of `weight`.

    On a CPU torch's own makes eight passes with as many temporary tensors: 20 times slower at 512 rows of 4,096.
    """
    if hidden.device.type != "cpu":
        return functional.rms_norm(hidden, hidden.shape[-1:], weight.to(hidden.dtype), epsilon).to(weight.dtype)
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
    normed: Tensor = (hidden * scale).mul_(weight).to(weight.dtype)
    return normed


def add_rms_norm(hidden: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(hidden + delta, its RMSNorm in the type of `weight`), both [rows, hidden_size]."""
    total = hidden + delta
    return total, rms_norm(total, weight, epsilon)


@dataclass(frozen=True)
class FusedOps:
    """One implementation of the functions of the same names."""

    rotate: Callable[[Tensor, Tensor], None]
    swiglu: Callable[[Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


EAGER = FusedOps(rotate, swiglu, rms_norm, add_rms_norm)


@cache
@torch.inference_mode()
def fastest(device: torch.device, dtype: torch.dtype) -> FusedOps:
    """The operations for activations of `dtype` on this device; Triton's are compared with EAGER before they are used.

    Triton needs a C compiler for its launchers; without one, or on a GPU that it does not know, EAGER is used.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return EAGER
    try:
        ops = triton_ops()
        is_equal = all(agrees_with_eager(ops, device, dtype, rows) for rows in (1, 5, 64))
    except Exception as error:  # noqa: BLE001
        # no compiler, an old driver: Triton documents no exception types
        logger.warning("Triton: %s; small operations run by torch's operators", str(error).partition("\n")[0])
        return EAGER
    return ops if is_equal else EAGER


def triton_ops() -> FusedOps:
    """Raises ImportError without Triton, which comes with torch's CUDA wheels only."""
    from kernels import ops_triton as ops

    return FusedOps(ops.rotate, ops.swiglu, ops.rms_norm, ops.add_rms_norm)


def agrees_with_eager(ops: FusedOps, device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether `ops` computes what EAGER does, within a few units of the type's last place."""
    generator = torch.Generator().manual_seed(rows)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    heads, gate_up, hidden, delta = random(rows, 6, 32), random(rows, 192), random(rows, 96).float(), random(rows, 96)
    weight = random(96)
    rotations = torch.view_as_complex(torch.randn(rows, 1, 8, 2, generator=generator).to(device))
    rotated, expected = heads.clone(), heads.clone()
    ops.rotate(rotated[:, :4, :16], rotations)
    EAGER.rotate(expected[:, :4, :16], rotations)
    pairs = [
        (rotated, expected),
        (ops.swiglu(gate_up), EAGER.swiglu(gate_up)),
        (ops.rms_norm(hidden, weight, 1e-5), EAGER.rms_norm(hidden, weight, 1e-5)),
        *zip(
            ops.add_rms_norm(hidden, delta, weight, 1e-5), EAGER.add_rms_norm(hidden, delta, weight, 1e-5), strict=True
        ),
    ]
    tolerance = 8 * torch.finfo(dtype).eps
    return all(
        a.dtype == b.dtype and torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance) for a, b in pairs
    )
