"""The tensors of ChatGLM checkpoints, checked against their configuration and dequantised from int4 and int8.

The quantised layout is that of ChatGLM's `QuantizedLinear`: an int8 `weight` and one half-precision `weight_scale` per
output row. With 8 bits a byte is a weight; with 4 bits a byte is two neighbours, the even column in the high nibble.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.precision import Progress
from models.checkpoints.shards import TensorInfo, read_tensors
from models.family import ImportRefused

SCALE = "_scale"  # suffix of the name of a packed weight
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def quantization_bits(config: Mapping[str, Any]) -> int:
    """Bits of a packed weight by config.json; 0 for unquantised weights. Raises ImportRefused."""
    bits = config.get("quantization_bit") or 0
    if bits not in (0, 4, 8):
        raise ImportRefused(f"config.json says quantization_bit={bits!r}; only 4, 8 and unquantised can be imported")
    return int(bits)


def check_tensors(
    found: Mapping[str, TensorInfo],
    shapes: Mapping[str, tuple[int, ...]],
    packed: Collection[str],
    bits: int,
    is_ignored: Callable[[str], bool],
) -> None:
    """Raise ImportRefused unless `found` has exactly the tensors of `shapes`, each with its shape and a type that fits.

    packed: names of the weights that are stored in `bits` bits, with their scales.
    """
    expected = dict(shapes)
    for name in packed:
        expected[name] = _packed_shape(shapes[name], bits)
        expected[f"{name}{SCALE}"] = shapes[name][:1]
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ImportRefused(f"the checkpoint lacks {len(missing)} of {len(expected)} tensors, first {missing[0]}")
    extra = sorted(name for name in found.keys() - expected.keys() if not is_ignored(name))
    if extra:
        raise ImportRefused(f"the checkpoint has {len(extra)} tensors that this network lacks, first {extra[0]}")
    for name, shape in expected.items():
        info = found[name]
        if info.dtype not in ((torch.int8,) if name in packed else FLOATS):
            raise ImportRefused(f"tensor {name} is {info.dtype}, but config.json says quantization_bit={bits}")
        if info.shape != shape:
            raise ImportRefused(f"tensor {name} has shape {list(info.shape)}; config.json says {list(shape)}")


def _packed_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """The stored shape of a weight of `shape` [out, in]: [out, in] or [out, in / 2]."""
    return (shape[0], shape[1] * bits // 8)


def read_dequantized(
    shards: Sequence[Path], packed: Collection[str], bits: int, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a whole checkpoint, shard by shard, those in `packed` dequantised to float16.

    A tensor is valid until the next one is read.
    """
    waiting: dict[str, Tensor] = {}  # packed weights whose scales were not read yet, or the other way round
    for name, tensor in read_tensors(shards, progress):
        weight_name = name.removesuffix(SCALE)
        if weight_name not in packed:
            yield name, tensor
        elif weight_name not in waiting:
            waiting[weight_name] = tensor.clone()
        else:
            other = waiting.pop(weight_name)
            weight, scale = (tensor, other) if name == weight_name else (other, tensor)
            yield weight_name, _dequantize(weight, scale.half(), bits)


def _dequantize(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Stored bytes -> weights: [out, in * bits / 8] int8 and [out] half -> [out, in] half.

    The product is rounded to half once, as in the original kernels.
    """
    if bits == 4:
        high = weight >> 4  # arithmetic shift: the sign stays
        low = (weight << 4) >> 4
        weight = torch.stack((high, low), dim=-1).flatten(1)
    return weight.to(scale.dtype) * scale[:, None]
