"""Attention over a KV cache in blocks on a GPU: single rows split over the length, and chunks of prompts. Triton.

keys [blocks, kv_heads, head_dim, BLOCK], values [blocks, kv_heads, BLOCK, head_dim], in int8 with scales
[blocks, kv_heads, BLOCK] float32 each; tables [sequences, blocks] int32.
The query heads of a key head are one small matrix, so that keys and values are read once for all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16  # tokens of a block
TOKENS = 64  # that a program reads at a time
MAX_PARTS = 32  # of one sequence
MIN_GROUP = 16  # rows of the smallest matrix product
PREFILL_QUERIES = 128  # rows of a program's matrix: rows of the chunk times the heads of a key head


@triton.jit
def _attend(
    q, keys, values, table, head, low, high, begin, end, scale,
    key_block, key_head, key_channel, value_block, value_head, value_token, key_scales, value_scales, scale_block,
    rows: tl.constexpr, dim: tl.constexpr, tokens: tl.constexpr, block: tl.constexpr, is_int8: tl.constexpr,
):  # fmt: skip
    """Online softmax of `q` [rows, dim] over tokens `begin` to `end`; each row sees `low` to `high` of them."""
    maxima = tl.full([rows], float("-inf"), tl.float32)
    sums = tl.zeros([rows], tl.float32)
    out = tl.zeros([rows, dim], tl.float32)
    channels = tl.arange(0, dim)
    for start in range(begin, end, tokens):
        token = start + tl.arange(0, tokens)
        inside = token < end
        number = tl.load(table + token // block, mask=inside, other=0).to(tl.int64)
        slot = token % block
        # a block's tokens lie side by side, so 16 of them are one load; those beyond `end` are hidden below
        place = number[None, :] * key_block + head * key_head + channels[:, None] * key_channel + slot[None, :]
        key = tl.load(keys + tl.max_contiguous(tl.multiple_of(place, (1, block)), (1, block)))
        score = tl.dot(q, key.to(q.dtype)) * scale
        if is_int8:  # one scale for each token and head
            of_token = number * scale_block + head * block + slot
            score *= tl.load(key_scales + of_token, mask=inside, other=0.0)[None, :]
        visible = (token[None, :] >= low[:, None]) & (token[None, :] < high[:, None]) & inside[None, :]
        score = tl.where(visible, score, float("-inf"))
        largest = tl.maximum(maxima, tl.max(score, 1))
        base = tl.where(largest == float("-inf"), 0.0, largest)
        weight = tl.exp(score - base[:, None])
        factor = tl.exp(maxima - base)
        sums = sums * factor + tl.sum(weight, 1)
        value = tl.load(
            values + number[:, None] * value_block + head * value_head + slot[:, None] * value_token
            + channels[None, :],
            mask=inside[:, None], other=0.0,
        )  # fmt: skip
        if is_int8:
            weight *= tl.load(value_scales + of_token, mask=inside, other=0.0)[None, :]
        out = out * factor[:, None] + tl.dot(weight.to(q.dtype), value.to(q.dtype))
        maxima = largest
    return out, maxima, sums


@triton.jit(do_not_specialize=["max_blocks", "window", "parts"])
def _decode(
    q, keys, values, tables, lengths, partial, numbers, scale, max_blocks, window, parts,
    key_block, key_head, key_channel, value_block, value_head, value_token, key_scales, value_scales, scale_block,
    heads: tl.constexpr, kv_heads: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, dim: tl.constexpr,
    tokens: tl.constexpr, block: tl.constexpr, is_int8: tl.constexpr,
):  # fmt: skip
    """One part of one sequence and key head. partial: [rows, heads, parts, dim]; numbers: the same, 2: maximum, sum."""
    sequence, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    share = tl.cdiv(tl.cdiv(length, parts), tokens) * tokens
    begin, end = part * share, tl.minimum(part * share + share, length)
    m, channels = tl.arange(0, rows), tl.arange(0, dim)
    row = sequence * heads + head * group + m
    query = tl.load(q + row[:, None].to(tl.int64) * dim + channels[None, :], mask=(m < group)[:, None], other=0.0)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    low, high = tl.zeros([rows], tl.int32) + first, tl.zeros([rows], tl.int32) + length
    out, maxima, sums = _attend(
        query, keys, values, tables + sequence.to(tl.int64) * max_blocks, head, low, high, begin, end, scale,
        key_block, key_head, key_channel, value_block, value_head, value_token, key_scales, value_scales, scale_block,
        rows, dim, tokens, block, is_int8,
    )  # fmt: skip
    at = (row * parts + part).to(tl.int64)
    tl.store(partial + at[:, None] * dim + channels[None, :], out, mask=(m < group)[:, None])
    tl.store(numbers + at * 2, maxima, mask=m < group)
    tl.store(numbers + at * 2 + 1, sums, mask=m < group)


@triton.jit(do_not_specialize=["parts"])
def _merge(partial, numbers, out, parts, dim: tl.constexpr, max_parts: tl.constexpr):
    """The parts of one row and head -> its output."""
    row = tl.program_id(0).to(tl.int64)
    part, channels = tl.arange(0, max_parts), tl.arange(0, dim)
    inside = part < parts
    maxima = tl.load(numbers + (row * parts + part) * 2, mask=inside, other=float("-inf"))
    sums = tl.load(numbers + (row * parts + part) * 2 + 1, mask=inside, other=0.0)
    factor = tl.where(maxima == float("-inf"), 0.0, tl.exp(maxima - tl.max(maxima, 0)))
    values = tl.load(partial + (row * parts + part)[:, None] * dim + channels[None, :], mask=inside[:, None], other=0.0)
    total = tl.sum(values * factor[:, None], 0) / tl.sum(sums * factor, 0)
    tl.store(out + row * dim + channels, total.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["max_blocks", "window"])
def _prefill(
    q, keys, values, offsets, tables, lengths, out, scale, max_blocks, window,
    key_block, key_head, key_channel, value_block, value_head, value_token, key_scales, value_scales, scale_block,
    heads: tl.constexpr, group: tl.constexpr, queries: tl.constexpr, dim: tl.constexpr, tokens: tl.constexpr,
    block: tl.constexpr, is_int8: tl.constexpr,
):  # fmt: skip
    """Some rows of one sequence's chunk, for one key head."""
    tile, sequence, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last, length = tl.load(offsets + sequence), tl.load(offsets + sequence + 1), tl.load(lengths + sequence)
    m, channels = tl.arange(0, queries), tl.arange(0, dim)
    rows_of_tile: tl.constexpr = queries // group
    row = first + tile * rows_of_tile + m // group
    inside = (row < last) & (m < rows_of_tile * group)
    index = length - last + row
    at = row.to(tl.int64) * heads + head * group + m % group
    if first + tile * rows_of_tile < last:
        query = tl.load(q + at[:, None] * dim + channels[None, :], mask=inside[:, None], other=0.0)
        high = tl.where(inside, index + 1, 0)
        low = tl.where(window > 0, tl.maximum(index + 1 - window, 0), 0)
        end = tl.max(high, 0)
        begin = tl.min(tl.where(inside, low, length), 0) // tokens * tokens
        total, _, sums = _attend(
            query, keys, values, tables + sequence.to(tl.int64) * max_blocks, head, low, high, begin, end, scale,
            key_block, key_head, key_channel, value_block, value_head, value_token,
            key_scales, value_scales, scale_block, queries, dim, tokens, block, is_int8,
        )  # fmt: skip
        total = total / tl.where(inside, sums, 1.0)[:, None]
        tl.store(out + at[:, None] * dim + channels[None, :], total.to(out.dtype.element_ty), mask=inside[:, None])


def _memory(keys: Tensor, values: Tensor, scales: tuple[Tensor, Tensor] | None) -> tuple[Any, ...]:
    """The kernels' arguments that say where keys, values and their scales are."""
    strides = (*keys.stride()[:3], *values.stride()[:3])
    return (*strides, keys, values, 0) if scales is None else (*strides, *scales, scales[0].stride(0))


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    tables: Tensor,
    lengths: Tensor,
    max_length: int,
    scale: float,
    window: int,
) -> Tensor:
    """query: [sequences, heads, head_dim], one row each; lengths: [sequences] int32; window: 0 or tokens."""
    num_sequences, num_heads, dim = query.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    query = query.contiguous()
    parts = min(MAX_PARTS, max(1, max_length // (4 * TOKENS)), max(1, 512 // (num_sequences * num_kv_heads)))
    partial = torch.empty((num_sequences, num_heads, parts, dim), dtype=torch.float32, device=query.device)
    numbers = torch.empty((num_sequences, num_heads, parts, 2), dtype=torch.float32, device=query.device)
    _decode[(num_sequences, num_kv_heads, parts)](
        query, keys, values, tables, lengths, partial, numbers, scale, tables.shape[1], window, parts,
        *_memory(keys, values, scales), num_heads, num_kv_heads, group,
        max(MIN_GROUP, triton.next_power_of_2(group)), dim, TOKENS, BLOCK, scales is not None, num_warps=4,
    )  # fmt: skip
    out = torch.empty_like(query)
    _merge[(num_sequences * num_heads,)](partial, numbers, out, parts, dim, MAX_PARTS, num_warps=1)
    return out


def prefill(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    offsets: Tensor,
    tables: Tensor,
    lengths: Tensor,
    max_rows: int,
    scale: float,
    window: int,
) -> Tensor:
    """query: [rows, heads, head_dim]; offsets: [sequences + 1] int32, the rows of each; the rest as for `decode`."""
    num_heads, dim = query.shape[1:]
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    queries = max(PREFILL_QUERIES, triton.next_power_of_2(group))
    query = query.contiguous()
    out = torch.empty_like(query)
    tiles = triton.cdiv(max_rows, queries // group)
    _prefill[(tiles, len(lengths), num_kv_heads)](
        query, keys, values, offsets, tables, lengths, out, scale, tables.shape[1], window,
        *_memory(keys, values, scales), num_heads, group, queries, dim, TOKENS, BLOCK, scales is not None,
        num_warps=8 if queries >= 128 else 4,
    )  # fmt: skip
    return out
