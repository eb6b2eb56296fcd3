"""The small operations between a layer's products; on a GPU compiled, each into one kernel. Knows tensors only.

After CUDA graphs have taken the launches' price, what remains of a small operation is its own reading and writing and a
gap of a microsecond or two; a layer of six billion parameters has a dozen of them. torch.compile needs Triton, which
comes with torch's CUDA wheels, and a C compiler; where it fails, the plain operations serve.
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


def rotate_formula(heads: Tensor, turns: Tensor) -> None:
    """`rotate` in the real numbers that a compiler knows. turns: [rows, 1, rotated / 2, 2] float32, cosine and sine."""
    real, imaginary = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = turns.unbind(-1)
    turned = torch.stack((real * cosine - imaginary * sine, imaginary * cosine + real * sine), dim=-1)
    heads.copy_(turned.flatten(-2))


def rotate(heads: Tensor, turns: Tensor) -> None:
    """Turn neighbouring channels (0,1), (2,3)… in place, as complex numbers.

    heads: [rows, heads, rotated]; turns: [rows, 1, rotated / 2] complex64.
    """
    if heads.dtype == torch.float32:
        torch.view_as_complex(heads.unflatten(-1, (-1, 2))).mul_(turns)
        return
    turned = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2))) * turns
    heads.copy_(torch.view_as_real(turned).flatten(-2))


def swiglu(gate_up: Tensor) -> Tensor:
    """[rows, 2 * inner] -> [rows, inner]"""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension, the mean in float32. Same shape and type.

    On a CPU torch's own runs through eight passes with as many temporary tensors: 20 times slower at 512 rows of 4,096.
    """
    if hidden.device.type != "cpu":
        return functional.rms_norm(hidden, hidden.shape[-1:], weight, epsilon)
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
    normed: Tensor = (hidden * scale).mul_(weight).to(hidden.dtype)
    return normed


def add_norm(hidden: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(hidden + delta, the same normed), both [rows, hidden_size]."""
    total = hidden + delta
    return total, norm(total, weight, epsilon)


def eight_bits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, inputs] -> int8 of the same shape, and [rows, 1] float32: rows = values * scale, a scale for each row."""
    rows = rows.float()
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    return (rows / scale).round().to(torch.int8), scale


def widen_product(product: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """[rows, outputs] int32 -> float32, each row and each output by its scale, and the bias."""
    return product.float() * row_scale * scale + bias


@dataclass(frozen=True)
class SmallOps:
    """See the functions of the same names."""

    rotate: Callable[[Tensor, Tensor], None]
    swiglu: Callable[[Tensor], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    eight_bits: Callable[[Tensor], tuple[Tensor, Tensor]]
    widen_product: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


PLAIN = SmallOps(rotate, swiglu, add_norm, eight_bits, widen_product)


def with_compiler(compiler: Callable[[Any], Any]) -> SmallOps:
    """The operations as `compiler` makes them of their formulas."""
    turn = compiler(rotate_formula)
    return SmallOps(
        rotate=lambda heads, turns: turn(heads, torch.view_as_real(turns)),
        swiglu=compiler(swiglu),
        add_norm=compiler(add_norm),
        eight_bits=compiler(eight_bits),
        widen_product=compiler(widen_product),
    )


@torch.inference_mode()
def compiled(device: torch.device, dtype: torch.dtype) -> SmallOps:
    """Compiled for any number of rows; the plain ones where compiling fails or gives other numbers. Takes seconds."""
    made = with_compiler(lambda function: torch.compile(function, dynamic=True))
    try:
        works = all(agree(made, device, dtype, rows) for rows in (1, 5, 64))
    except Exception as error:  # noqa: BLE001
        # whatever a compiler may raise
        logger.warning("small operations are not compiled: %s", str(error).partition("\n")[0])
        return PLAIN
    return made if works else PLAIN


def agree(made: SmallOps, device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether `made` computes what the plain operations do, within a few units of the type's last place."""
    generator = torch.Generator().manual_seed(rows)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    heads, gate_up, hidden, delta = random(rows, 6, 32), random(rows, 64), random(rows, 32), random(rows, 32)
    weight = random(32)
    turns = torch.view_as_complex(torch.randn(rows, 1, 8, 2, generator=generator).to(device))
    turned, expected = heads.clone(), heads.clone()
    made.rotate(turned[:, :4, :16], turns)
    PLAIN.rotate(expected[:, :4, :16], turns)
    pairs = [
        (turned, expected),
        (made.swiglu(gate_up), PLAIN.swiglu(gate_up)),
        *zip(made.add_norm(hidden, delta, weight, 1e-5), PLAIN.add_norm(hidden, delta, weight, 1e-5), strict=True),
    ]
    levels, scale = made.eight_bits(hidden)
    if not torch.allclose(levels * scale, hidden.float(), atol=float(scale.max())):
        return False
    sums = (levels.int() * 1000, scale, weight.float(), weight.float())
    pairs.append((made.widen_product(*sums), PLAIN.widen_product(*sums)))
    tolerance = 8 * torch.finfo(dtype).eps
    return all(torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance) for a, b in pairs)
