"""The small operations of a decoder layer on a GPU, one launch each: norms, SwiGLU, rotation, and the cache store.

`kernels.fused_ops` has the same operations in torch's operators, and uses these where Triton works.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(
    hidden, delta, weight, total_out, normed_out, epsilon, size, block: tl.constexpr, has_delta: tl.constexpr
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64) * size
    channel = tl.arange(0, block)
    inside = channel < size
    total = tl.load(hidden + row + channel, mask=inside, other=0.0).to(tl.float32)
    if has_delta:
        total += tl.load(delta + row + channel, mask=inside, other=0.0).to(tl.float32)
        tl.store(total_out + row + channel, total, mask=inside)
    scale = tl.rsqrt(tl.sum(total * total) / size + epsilon)
    normed = total * scale * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_out + row + channel, normed, mask=inside)


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """[rows, size] -> the same shape in the type of `weight`."""
    hidden = hidden.contiguous()
    normed = torch.empty(hidden.shape, dtype=weight.dtype, device=hidden.device)
    size = hidden.shape[-1]
    block = triton.next_power_of_2(size)
    _rms_norm[(len(hidden),)](
        hidden, hidden, weight, hidden, normed, epsilon, size, block, False, num_warps=_warps(block)
    )
    return normed


def add_rms_norm(hidden: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(hidden + delta in hidden's type, its RMSNorm in the type of `weight`), both [rows, size]."""
    hidden, delta = hidden.contiguous(), delta.contiguous()
    total = torch.empty_like(hidden)
    normed = torch.empty(hidden.shape, dtype=weight.dtype, device=hidden.device)
    size = hidden.shape[-1]
    block = triton.next_power_of_2(size)
    _rms_norm[(len(hidden),)](hidden, delta, weight, total, normed, epsilon, size, block, True, num_warps=_warps(block))
    return total, normed


def _warps(block: int) -> int:
    return max(1, min(16, block // 256))


@triton.jit
def _swiglu(gate_up, out, inner, block: tl.constexpr):
    row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    inside = channel < inner
    gate = tl.load(gate_up + row * 2 * inner + channel, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * inner + channel, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """[rows, 2 * inner] -> [rows, inner]"""
    gate_up = gate_up.contiguous()
    rows, inner = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty((rows, inner), dtype=gate_up.dtype, device=gate_up.device)
    _swiglu[(rows, triton.cdiv(inner, 1024))](gate_up, out, inner, 1024, num_warps=4)
    return out


@triton.jit
def _rotate(heads, rotations, row_stride, head_stride, num_heads, half, block_heads: tl.constexpr, block: tl.constexpr):
    """Some heads of one row; neighbouring channels are a complex number."""
    row = tl.program_id(0).to(tl.int64)
    channel, head = tl.arange(0, 2 * block), tl.program_id(1) * block_heads + tl.arange(0, block_heads)
    inside = (channel < 2 * half)[None, :] & (head < num_heads)[:, None]
    pairs = tl.load(rotations + row * half * 2 + channel, mask=channel < 2 * half, other=0.0)
    cosine, sine = tl.split(tl.reshape(pairs, [block, 2]))
    place = heads + row * row_stride + head[:, None] * head_stride + channel[None, :]
    numbers = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    real, imaginary = tl.split(tl.reshape(numbers, [block_heads, block, 2]))
    rotated = tl.join(
        real * cosine[None, :] - imaginary * sine[None, :], imaginary * cosine[None, :] + real * sine[None, :]
    )
    tl.store(place, tl.reshape(rotated, [block_heads, 2 * block]), mask=inside)


def rotate(heads: Tensor, rotations: Tensor) -> None:
    """heads: [rows, heads, rotated], changed in place; rotations: [rows, 1, rotated / 2] complex64."""
    rows, num_heads, rotated = heads.shape
    half = rotated // 2
    _rotate[(rows, triton.cdiv(num_heads, 4))](
        heads, torch.view_as_real(rotations), heads.stride(0), heads.stride(1), num_heads, half, 4,
        triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip


@triton.jit
def _store(
    key, value, keys, values, blocks, offsets, key_row, value_row, key_head_stride, value_head_stride,
    key_block, key_head, key_channel, value_block, value_head, value_token, key_scales, value_scales, scale_block,
    kv_heads: tl.constexpr, dim: tl.constexpr, tokens: tl.constexpr, is_int8: tl.constexpr,
):  # fmt: skip
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, dim)
    block, offset = tl.load(blocks + row), tl.load(offsets + row)
    for head in tl.static_range(kv_heads):
        one = tl.load(key + row * key_row + head * key_head_stride + channel)
        other = tl.load(value + row * value_row + head * value_head_stride + channel)
        if is_int8:
            of_token = block * scale_block + head * tokens + offset
            key_scale = tl.max(tl.abs(one.to(tl.float32))) / 127.0
            value_scale = tl.max(tl.abs(other.to(tl.float32))) / 127.0
            tl.store(key_scales + of_token, key_scale)
            tl.store(value_scales + of_token, value_scale)
            # to the nearest even: a large number added and subtracted leaves no fraction
            one = ((one.to(tl.float32) / tl.maximum(key_scale, 1e-30) + 12582912.0) - 12582912.0).to(tl.int8)
            other = ((other.to(tl.float32) / tl.maximum(value_scale, 1e-30) + 12582912.0) - 12582912.0).to(tl.int8)
        tl.store(keys + block * key_block + head * key_head + channel * key_channel + offset, one)
        tl.store(values + block * value_block + head * value_head + offset * value_token + channel, other)


def store(
    keys: Tensor,
    values: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    blocks: Tensor,
    offsets: Tensor,
    key: Tensor,
    value: Tensor,
) -> None:
    """One layer's cache: keys [blocks, kv_heads, head_dim, BLOCK], values [blocks, kv_heads, BLOCK, head_dim], in int8
    with scales [blocks, kv_heads, BLOCK] float32 each.

    key, value: [rows, kv_heads, head_dim] of the tokens at `offsets` in `blocks`, [rows] int64 each.
    """
    rows, kv_heads, dim = key.shape
    _store[(rows,)](
        key, value, keys, values, blocks, offsets, key.stride(0), value.stride(0), key.stride(1), value.stride(1),
        *keys.stride()[:3], *values.stride()[:3], *(scales or (keys, values)),
        0 if scales is None else scales[0].stride(0), kv_heads, dim, keys.shape[-1], scales is not None, num_warps=1,
    )  # fmt: skip
