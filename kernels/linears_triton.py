"""Products with int8 and int4 weights on a GPU, in Triton: 8-bit activations and weights, scales for groups of inputs.

Formats as on CPUs (`kernels.layouts.Format`): a scale for each output and GROUP inputs, or one for each output, and for
4 bits a middle. Activations are rounded to 8 bits with a scale for each row and GROUP inputs. Values are padded with
zeros to a multiple of PADDING inputs.

    int8   values [outputs, padded] int8
    int4   values [outputs, padded / 2] uint8: byte c of each 32 holds inputs c (low half) and c + 32 of 64, plus 8

Up to FEW rows read the weights once, four products an instruction (`dp4a`); more rows use the matrix units' int8
products; above MANY rows the weights are widened to 16 bits first and multiplied by cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear, pad

from kernels.layouts import BY_ROW, GROUP, INT8_FORMATS, QuantizedWeight

PADDING = 512  # inputs
FEW, MANY = 4, 64  # rows


@dataclass(frozen=True)
class GpuWeight:
    """A quantised weight as these kernels read it."""

    values: Tensor
    scale: Tensor  # [outputs, padded / GROUP], or [outputs, 1]
    middle: Tensor | None  # [outputs, padded / GROUP]
    bias: Tensor | None  # [outputs] float32
    outputs: int
    inputs: int
    padded: int
    is_int8: bool

    @property
    def by_row(self) -> bool:
        return self.scale.shape[1] == 1


def pack(weight: QuantizedWeight, bias: Tensor | None) -> GpuWeight:
    """The weight in the kernels' layout, on its device."""
    outputs, inputs = weight.values.shape
    missing = -inputs % PADDING
    values = pad(weight.values, (0, missing))
    scale, middle = weight.scale[:, None] if weight.format in BY_ROW else weight.scale, weight.middle
    num_groups = (inputs + missing) // GROUP
    if weight.format not in BY_ROW:
        scale = pad(scale, (0, num_groups - scale.shape[1]))
    if middle is not None:
        middle = pad(middle, (0, num_groups - middle.shape[1])).contiguous()
    is_int8 = weight.format in INT8_FORMATS
    if not is_int8:
        halves = (values + 8).byte().view(outputs, -1, 2, GROUP)
        values = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)
    bias = None if bias is None else bias.float()
    return GpuWeight(values.contiguous(), scale.contiguous(), middle, bias, outputs, inputs, inputs + missing, is_int8)


@triton.jit
def _quantize(x, values, scales, sums, inputs, padded: tl.constexpr, groups: tl.constexpr):
    """Some groups of one row. sums: scale * the sum of the group's values."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * groups + tl.arange(0, groups)
    channel = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    number = tl.load(x + row * inputs + channel, mask=channel < inputs, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(number), 1) / 127.0, 1e-12)
    # to the nearest even, as torch and the CPU kernels round
    rounded = ((number / scale[:, None] + 12582912.0) - 12582912.0).to(tl.int32)
    tl.store(values + row * padded + channel, rounded.to(tl.int8))
    tl.store(scales + row * (padded // 32) + group, scale)
    tl.store(sums + row * (padded // 32) + group, scale * tl.sum(rounded, 1).to(tl.float32))


@triton.jit
def _dot(word, x, bits: tl.constexpr):
    """Sums over the last dimension of four products a word. x: signed; word: signed, or for 4 bits unsigned."""
    mine = tl.broadcast_to(x[None, :, :], word.shape)
    zero = tl.zeros(word.shape, tl.int32)
    if bits == 8:
        dots = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [word, mine, zero], tl.int32, True, 1
        )
    else:
        dots = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [word, mine, zero], tl.int32, True, 1
        )
    return tl.sum(dots, 2).to(tl.float32)


@triton.jit
def _half(
    word, factor, offset, x, x_scale, x_sum, row, group, w,
    padded: tl.constexpr, bits: tl.constexpr, by_row: tl.constexpr,
):  # fmt: skip
    """[block, groups]: the products of some groups of one row with the weights in `word`."""
    at = row * (padded // 32) + group
    product = _dot(word, tl.load(x + row * (padded // 4) + group[:, None] * 8 + w[None, :]), bits)
    product *= tl.load(x_scale + at)[None, :]
    if not by_row:
        product *= factor
    if bits == 4:
        product += tl.load(x_sum + at)[None, :] * offset
    return product


@triton.jit
def _few_rows(
    x, x_scale, x_sum, values, scale, middle, bias, out, outputs,
    rows: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, groups: tl.constexpr, bits: tl.constexpr,
    by_row: tl.constexpr, has_middle: tl.constexpr, has_bias: tl.constexpr,
):  # fmt: skip
    """`block` outputs of one, two or four rows; `groups` of inputs at a time, as words of four."""
    n = tl.program_id(0) * block + tl.arange(0, block)
    inside = (n < outputs)[:, None]
    num_groups: tl.constexpr = padded // 32
    per_unit: tl.constexpr = 8 // bits
    w, u = tl.arange(0, 8), tl.arange(0, groups // per_unit)
    sum_0 = tl.zeros([block, groups // per_unit], tl.float32)
    sum_1, sum_2, sum_3 = sum_0, sum_0, sum_0
    for first in range(0, num_groups, groups):
        unit = first // per_unit + u
        at = n.to(tl.int64)[:, None, None] * (padded * bits // 32) + (unit[:, None] * 8 + w[None, :])[None, :, :]
        words = tl.load(values + at, mask=inside[:, :, None], other=0)
        for half in tl.static_range(per_unit):
            group = per_unit * unit + half
            word = words if bits == 8 else (words >> (4 * half)) & 0x0F0F0F0F
            factor, offset = 1.0, -8.0
            if not by_row:
                places = n[:, None] * num_groups + group[None, :]
                factor = tl.load(scale + places, mask=inside, other=0.0).to(tl.float32)
                offset = -8.0 * factor
                if has_middle:
                    offset += tl.load(middle + places, mask=inside, other=0.0).to(tl.float32)
            sum_0 += _half(word, factor, offset, x, x_scale, x_sum, 0, group, w, padded, bits, by_row)
            if rows > 1:
                sum_1 += _half(word, factor, offset, x, x_scale, x_sum, 1, group, w, padded, bits, by_row)
            if rows > 2:
                sum_2 += _half(word, factor, offset, x, x_scale, x_sum, 2, group, w, padded, bits, by_row)
                sum_3 += _half(word, factor, offset, x, x_scale, x_sum, 3, group, w, padded, bits, by_row)
    _store_row(sum_0, scale, bias, out, 0, n, outputs, by_row, has_bias)
    if rows > 1:
        _store_row(sum_1, scale, bias, out, 1, n, outputs, by_row, has_bias)
    if rows > 2:
        _store_row(sum_2, scale, bias, out, 2, n, outputs, by_row, has_bias)
        _store_row(sum_3, scale, bias, out, 3, n, outputs, by_row, has_bias)


@triton.jit
def _store_row(sums, scale, bias, out, row, n, outputs, by_row: tl.constexpr, has_bias: tl.constexpr):
    result = tl.sum(sums, 1)
    if by_row:
        result *= tl.load(scale + n, mask=n < outputs, other=0.0).to(tl.float32)
    if has_bias:
        result += tl.load(bias + n, mask=n < outputs, other=0.0)
    tl.store(out + row * outputs + n, result.to(out.dtype.element_ty), mask=n < outputs)


@triton.jit(do_not_specialize=["rows"])
def _more_rows(
    x, x_scale, x_sum, values, scale, middle, bias, out, rows, outputs,
    padded: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, bits: tl.constexpr,
    by_row: tl.constexpr, has_middle: tl.constexpr, has_bias: tl.constexpr,
):  # fmt: skip
    """A tile of the product, by int8 matrix instructions; one group of inputs at a time."""
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    num_groups: tl.constexpr = padded // 32
    c = tl.arange(0, 32)
    in_m, in_n = m < rows, n < outputs
    total = tl.zeros([block_m, block_n], tl.float32)
    of_m, of_n = m * num_groups, n * num_groups
    if bits == 8:
        for group in range(num_groups):
            row = tl.load(x + m[:, None] * padded + (group * 32 + c)[None, :], mask=in_m[:, None], other=0)
            weight = tl.load(
                values + n.to(tl.int64)[None, :] * padded + (group * 32 + c)[:, None], mask=in_n[None, :], other=0
            )
            product = (
                tl.dot(row, weight).to(tl.float32) * tl.load(x_scale + of_m + group, mask=in_m, other=0.0)[:, None]
            )
            if not by_row:
                product *= tl.load(scale + of_n + group, mask=in_n, other=0.0).to(tl.float32)[None, :]
            total += product
    else:
        for unit in range(num_groups // 2):
            both = tl.load(
                values + n.to(tl.int64)[None, :] * (padded // 2) + (unit * 32 + c)[:, None], mask=in_n[None, :], other=0
            )
            for half in tl.static_range(2):
                group = 2 * unit + half
                row = tl.load(x + m[:, None] * padded + (group * 32 + c)[None, :], mask=in_m[:, None], other=0)
                weight = ((both >> (4 * half)) & 15).to(tl.int8) - 8
                product = (
                    tl.dot(row, weight).to(tl.float32) * tl.load(x_scale + of_m + group, mask=in_m, other=0.0)[:, None]
                )
                if not by_row:
                    product *= tl.load(scale + of_n + group, mask=in_n, other=0.0).to(tl.float32)[None, :]
                if has_middle:
                    sums = tl.load(x_sum + of_m + group, mask=in_m, other=0.0)
                    product += (
                        sums[:, None] * tl.load(middle + of_n + group, mask=in_n, other=0.0).to(tl.float32)[None, :]
                    )
                total += product
    if by_row:
        total *= tl.load(scale + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if has_bias:
        total += tl.load(bias + n, mask=in_n, other=0.0)[None, :]
    place = out + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def _widen(
    values, scale, middle, out, inputs, padded: tl.constexpr, bits: tl.constexpr, by_row: tl.constexpr,
    has_middle: tl.constexpr, units: tl.constexpr,
):  # fmt: skip
    """Some units of one output, in 16 bits."""
    n = tl.program_id(0).to(tl.int64)
    num_groups: tl.constexpr = padded // 32
    u, c = tl.program_id(1) * units + tl.arange(0, units), tl.arange(0, 32)
    if bits == 4:
        both = tl.load(values + n * (padded // 2) + u[:, None] * 32 + c[None, :])
    for half in tl.static_range(2):
        group = 2 * u + half
        if bits == 8:
            weight = tl.load(values + n * padded + group[:, None] * 32 + c[None, :]).to(tl.float32)
        else:
            weight = (((both >> (4 * half)) & 15).to(tl.int32) - 8).to(tl.float32)
        if by_row:
            weight *= tl.load(scale + n).to(tl.float32)
        else:
            weight *= tl.load(scale + n * num_groups + group).to(tl.float32)[:, None]
        if has_middle:
            weight += tl.load(middle + n * num_groups + group).to(tl.float32)[:, None]
        channel = group[:, None] * 32 + c[None, :]
        tl.store(out + n * inputs + channel, weight.to(out.dtype.element_ty), mask=channel < inputs)


def quantize(x: Tensor, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, inputs] -> values [rows, padded] int8; scales and scaled sums [rows, padded / GROUP] float32."""
    rows, inputs = x.shape
    values = torch.empty((rows, padded), dtype=torch.int8, device=x.device)
    scales, sums = torch.empty((2, rows, padded // GROUP), dtype=torch.float32, device=x.device).unbind(0)
    groups = 16
    _quantize[(rows, padded // GROUP // groups)](
        x.contiguous(), values, scales, sums, inputs, padded, groups, num_warps=2
    )
    return values, scales, sums


def widened(weight: GpuWeight, dtype: torch.dtype) -> Tensor:
    """[outputs, inputs] in 16 bits."""
    out = torch.empty((weight.outputs, weight.inputs), dtype=dtype, device=weight.values.device)
    _widen[(weight.outputs, weight.padded // PADDING)](
        weight.values, weight.scale, weight.middle, out, weight.inputs, weight.padded, 8 if weight.is_int8 else 4,
        weight.by_row, weight.middle is not None, PADDING // 64, num_warps=2,
    )  # fmt: skip
    return out


def product(x: Tensor, weight: GpuWeight) -> Tensor:
    """x: [rows, inputs] in 16 bits -> [rows, outputs]. Tiles as measured on an H200 (docs/gpu.md)."""
    rows = len(x)
    if rows > MANY:
        bias = None if weight.bias is None else weight.bias.to(x.dtype)
        return linear(x, widened(weight, x.dtype), bias)
    values, scales, sums = quantize(x, weight.padded)
    bits = 8 if weight.is_int8 else 4
    how = (weight.by_row, weight.middle is not None, weight.bias is not None)
    if rows <= FEW:
        at_once = triton.next_power_of_2(rows)
        if at_once > rows:
            values, scales, sums = (pad(tensor, (0, 0, 0, at_once - rows)) for tensor in (values, scales, sums))
        out = torch.empty((at_once, weight.outputs), dtype=x.dtype, device=x.device)
        groups = 64 if weight.padded % (64 * GROUP) == 0 else PADDING // GROUP
        block = 4 if rows == 1 and groups == 64 else 8
        _few_rows[(triton.cdiv(weight.outputs, block),)](
            values.view(torch.int32), scales, sums, weight.values.view(torch.int32), weight.scale, weight.middle,
            weight.bias, out, weight.outputs, at_once, weight.padded, block, groups, bits, *how, num_warps=4,
        )  # fmt: skip
        return out[:rows]
    out = torch.empty((rows, weight.outputs), dtype=x.dtype, device=x.device)
    block_m, block_n = max(16, triton.next_power_of_2(rows)), 64 if rows <= 16 else 128
    _more_rows[(triton.cdiv(rows, block_m), triton.cdiv(weight.outputs, block_n))](
        values, scales, sums, weight.values, weight.scale, weight.middle, weight.bias, out, rows, weight.outputs,
        weight.padded, block_m, block_n, bits, *how, num_warps=4, num_stages=8 if rows <= 16 else 4,
    )  # fmt: skip
    return out
