"""Reads the weights of the official int4 and int8 checkpoints back as half precision. Knows two packings, no names.

The layout is that of ChatGLM's `QuantizedLinear`: an int8 `weight` and one half-precision `weight_scale` per output
row. With 8 bits a byte is a weight; with 4 bits a byte is two neighbouring ones, the even column in the high nibble.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from kernels.precision import Progress
from models.checkpoints import shards as checkpoint
from models.checkpoints.shards import TensorInfo

SCALE = "_scale"  # behind the name of a packed weight


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


def read_weights(
    shards: list[Path], found: Mapping[str, TensorInfo], packed: Collection[str], bits: int, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a whole checkpoint, shard by shard; those in `packed` once, de-quantised. Tells `progress`.

    found: what `checkpoint.inspect_shards` says. A tensor is only good until the next one is asked for.
    """
    total, done = sum(info.num_bytes for info in found.values()), 0
    halves: dict[str, Tensor] = {}  # packed weights that wait for their scales, or the other way round
    for shard in shards:
        for name, tensor in checkpoint.read_shard(shard):
            weight_name = name.removesuffix(SCALE)
            if weight_name not in packed:
                yield name, tensor
            elif weight_name not in halves:
                halves[weight_name] = tensor.clone()
            else:
                other = halves.pop(weight_name)
                weight, scale = (tensor, other) if name == weight_name else (other, tensor)
                yield weight_name, dequantize(weight, scale.half(), bits)
            done += found[name].num_bytes
            progress(done, total, shard.name)
