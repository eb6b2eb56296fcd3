"""Linear layers with 8- and 4-bit weights on CUDA, by what the torch wheel brings. Knows no network.

    int8   a scale for each output channel and one for each token, products by cuBLASLt (`_int_mm`)
    int4   groups of GROUP weights with a scale and an offset, products by tinygemm (`_weight_int4pack_mm`, sm80 and
           newer); the head stays int8

Every kernel is tried on the device before it is used. A card that lacks one keeps the small weights and widens them at
each use: the model fits, and is slower than in 16 bits. (`_weight_int8pack_mm` has one thread for each output on CUDA
and reads every weight once for each token: not used.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.precision import Precision, Progress, UnsupportedPrecision
from kernels.quantization import GROUP, QuantizedLinear, Small, quantize_groups, quantize_rows, widen_groups
from kernels.small_ops import PLAIN

logger = logging.getLogger(__name__)
MIN_ROWS = 32  # `_int_mm` wants more than 16
TOLERANCE = {"int8": 5e-2, "int4": 0.2}
ops = cast("Any", torch.ops)


def compute_dtype(device: torch.device) -> torch.dtype:
    """The type of activations beside small weights: the one that the card multiplies."""
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return torch.bfloat16 if has_bfloat16 else torch.float16


def load_device(precision: Precision, device: torch.device) -> torch.device:
    """Where weights are read to before they are packed: a card for small weights has no room for large ones."""
    return torch.device("cpu") if device.type == "cuda" and precision in ("int8", "int4") else device


@torch.inference_mode()
def pack(model: nn.Module, precision: Small, device: torch.device, progress: Progress) -> None:
    """Bring `model` to `device`, every nn.Linear quantised there, one by one. Raises UnsupportedPrecision."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear | QuantizedLinear)
    ]
    total = sum(child.in_features * child.out_features for _, _, child in found)
    done = 0
    for parent, name, child in found:
        done += child.in_features * child.out_features
        fits = precision == "int4" and name != "lm_head" and child.in_features % (2 * GROUP) == 0
        # what is stored small is widened for a moment and comes out with the same values
        linear = child.widened() if isinstance(child, QuantizedLinear) else child
        setattr(parent, name, packed_linear(linear, "int4" if fits else "int8", device))
        progress(done, total, f"packing {precision}")
    model.to(device)


def packed_linear(linear: nn.Linear, precision: Small, device: torch.device) -> nn.Module:
    """One layer in its fastest form on `device`. Raises UnsupportedPrecision where there is none."""
    for kernel in KERNELS[precision]:
        if works_here(kernel, precision, device):
            return kernel(linear, device, compute_dtype(device))
    raise UnsupportedPrecision(f"{precision} weights do not work on {device}; use float16 or bfloat16")


class Int8Linear(nn.Module):
    """8-bit weights and, token by token, 8-bit activations: the format of models/linears.py, on tensor cores."""

    def __init__(self, linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        values, self._scale = quantize_rows(linear.weight.detach().to(device))
        self._values = values.T  # [in, out], column by column: what the kernel takes without a copy
        bias = _moved_bias(linear, device, torch.float32)
        self._bias = torch.zeros_like(self._scale) if bias is None else bias
        self.small = PLAIN

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        flat = x.reshape(-1, x.shape[-1])
        levels, row_scale = self.small.eight_bits(flat)
        if len(flat) < MIN_ROWS:
            levels = functional.pad(levels, (0, 0, 0, MIN_ROWS - len(flat)))
        product = torch._int_mm(levels, self._values)[: len(flat)]
        out = self.small.widen_product(product, row_scale, self._scale, self._bias)
        return out.to(x.dtype).view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """4-bit weights in tinygemm's layout, bfloat16 activations."""

    def __init__(self, linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        packed, self._middles = quantize_groups(linear.weight.detach().to(device))
        tiles = next(tiles for tiles in (8, 4, 2) if linear.in_features % (16 * tiles) == 0)
        self._packed = ops.aten._convert_weight_to_int4pack(packed, tiles)
        self._bias = _moved_bias(linear, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        flat = x.reshape(-1, x.shape[-1]).bfloat16()
        product = ops.aten._weight_int4pack_mm(flat, self._packed, GROUP, self._middles)
        product = product.to(x.dtype).view(*x.shape[:-1], -1)
        return cast("Tensor", product if self._bias is None else product.add_(self._bias))


class Widened8Linear(nn.Module):
    """8-bit weights, widened at each use."""

    def __init__(self, linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._values, scale = quantize_rows(linear.weight.detach().to(device))
        self._scale = scale[:, None].to(dtype)
        self._bias = _moved_bias(linear, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return functional.linear(x, self._values.to(x.dtype) * self._scale.to(x.dtype), self._bias)


class Widened4Linear(nn.Module):
    """4-bit weights, widened at each use."""

    def __init__(self, linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._packed, self._middles = quantize_groups(linear.weight.detach().to(device))
        self._bias = _moved_bias(linear, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return functional.linear(x, widen_groups(self._packed, self._middles, x.dtype), self._bias)


def _moved_bias(linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach().to(device, dtype)


Kernel = Callable[[nn.Linear, torch.device, torch.dtype], nn.Module]
KERNELS: dict[Small, tuple[Kernel, ...]] = {  # the best one first
    "int8": (Int8Linear, Widened8Linear),
    "int4": (Int4Linear, Widened4Linear),
}


@cache
@torch.inference_mode()
def works_here(kernel: Kernel, precision: Small, device: torch.device) -> bool:
    """Whether a format's kernel exists on this device and gives the right products, of few rows and of many."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(4 * GROUP, 96, bias=True)
    linear.weight.copy_(torch.randn(96, 4 * GROUP, generator=generator))
    x = torch.randn(40, 4 * GROUP, generator=generator)
    expected, dtype = linear(x), compute_dtype(device)
    try:
        packed = kernel(linear, device, dtype)
        few, many = packed(x[:3].to(device, dtype)), packed(x.to(device, dtype))
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        if kernel is KERNELS[precision][0]:
            reason = str(error).partition("\n")[0]
            logger.warning("%s has no %s kernel (%s): weights are widened at each use", device, precision, reason)
        return False
    errors = (few.float().cpu() - expected[:3], many.float().cpu() - expected)
    return all(bool(error.norm() <= TOLERANCE[precision] * expected.norm()) for error in errors)
