"""Reads the weights of the official int4 and int8 checkpoints back as half precision. Knows two packings, no files.

The layout is that of ChatGLM's `QuantizedLinear`: an int8 `weight` and one half-precision `weight_scale` per output
row. With 8 bits a byte is a weight; with 4 bits a byte is two neighbouring ones, the even column in the high nibble.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """The shape in which a weight of `shape` [out, in] is stored: [out, in] or [out, in / 2]."""
    return (shape[0], shape[1] * bits // 8)


def dequantize(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Stored bytes -> weights: [out, in * bits / 8] int8 and [out] half -> [out, in] half.

    The product is rounded to half once, as in the original kernels.
    """
    if bits == 4:
        high = weight >> 4  # arithmetic: the sign stays
        low = (weight << 4) >> 4
        weight = torch.stack((high, low), dim=-1).flatten(1)
    return weight.to(scale.dtype) * scale[:, None]
