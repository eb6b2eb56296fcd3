"""Queries, keys and values of a step's rows -> attention outputs, in one or two kernel calls for all sequences.

`StepAttention` goes from sequence to sequence, which costs a CPU nothing and a GPU one launch each. Here a decode row
(a sequence's next token, or a draft token behind it) counts as a sequence of its own: it attends to the `index + 1`
slots from its sequence's first one on. Chunks of prompts are a second call. Both use torch's flash kernel
(FlashAttention 2, in every CUDA wheel, sm80 and newer).

The kernel takes packed sequences by `cum_seq_k`, the slot where each one begins, and `seqused_k`, how many slots of it
count. It looks sequence i up at `cum_seq_k[i]` and, given `seqused_k`, reads no end from `cum_seq_k[i + 1]`: so the
ranges may be anywhere in any order, without a block table or a gather. `flash_works_here` checks that on the device.
Source: torch, aten/src/ATen/native/transformers/cuda/flash_attn/block_info.h.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from serving.engine.interface import AttentionFunction
from serving.engine.native.attention import AttentionSpan, KVMemory, StepAttention
from serving.engine.native.device import numbers_to_device

logger = logging.getLogger(__name__)
TOLERANCE = 2e-2  # of flash against plain attention, relative, in 16 bits


@dataclass(frozen=True)
class Packed:
    """Rows of several sequences end to end, described on the device."""

    offsets: Tensor  # [sequences + 1] int32: where each one's rows begin, and the number of rows
    starts: Tensor  # [sequences + 1] int32: each one's first slot; the last number is not used
    lengths: Tensor  # [sequences] int32: slots that its last row attends to
    max_rows: int  # of one sequence
    max_length: int  # an upper bound of `lengths`


@dataclass(frozen=True)
class Kernel:
    """An implementation of packed attention.

    attend: query [rows, heads, head_dim], keys and values [kv_heads, slots, head_dim], the rows, scale, window
    -> query's shape. Rows attend to their own sequence, causally.
    """

    attend: Callable[[Tensor, Tensor, Tensor, Packed, float, int | None], Tensor]
    takes_chunks: bool  # else at most one row a sequence


def flash(query: Tensor, keys: Tensor, values: Tensor, packed: Packed, scale: float, window: int | None) -> Tensor:
    """torch's flash kernel, for float16 and bfloat16.

    With one row a sequence, causality and an absent window are not passed: only then does the kernel share keys among
    the heads of a group and split long sequences over the whole card.
    `torch.nn.attention.varlen` calls the same operator, and fills a tensor that is never read at each call.
    """
    out = torch.ops.aten._flash_attention_forward(
        query,
        keys.transpose(0, 1),
        values.transpose(0, 1),
        packed.offsets,
        packed.starts,
        packed.max_rows,
        packed.max_length,
        0.0,
        packed.max_rows > 1 and window is None,
        False,
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=-1 if window is None else 0,
        seqused_k=packed.lengths,
    )
    return cast("Tensor", out[0])


def padded(query: Tensor, keys: Tensor, values: Tensor, packed: Packed, scale: float, window: int | None) -> Tensor:
    """Single rows on any device: every sequence is gathered and padded to the longest."""
    assert packed.max_rows == 1, "chunks use StepAttention where flash does not work"
    columns = torch.arange(packed.max_length, device=query.device)
    visible = columns < packed.lengths[:, None]
    if window is not None:
        visible &= columns >= packed.lengths[:, None] - window
    # masked columns read the sequence's own last slot: elsewhere there may be NaN, and 0 * NaN is NaN
    slots = packed.starts[:-1, None] + torch.minimum(columns, packed.lengths[:, None] - 1)
    grouped = query.reshape(len(query), keys.shape[0], -1, query.shape[-1])
    out = scaled_dot_product_attention(
        grouped,
        keys[:, slots].transpose(0, 1),
        values[:, slots].transpose(0, 1),
        visible[:, None, None],
        scale=scale,
    )
    return out.reshape(query.shape)


FLASH = Kernel(flash, takes_chunks=True)
PADDED = Kernel(padded, takes_chunks=False)


class PackedAttention:
    """One kernel for all rows. Implements serving.engine.interface.AttentionFunction."""

    def __init__(self, memory: KVMemory, slots: Tensor, packed: Packed, kernel: Kernel) -> None:
        """slots: [rows] int64, where each row's key and value are stored."""
        self._memory, self._slots, self._packed, self._attend = memory, slots, packed, kernel.attend

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        keys, values = self._memory.keys[layer], self._memory.values[layer]
        # the memory may be narrower than the rows, and the kernels want one type
        keys.index_copy_(1, self._slots, key.transpose(0, 1).to(keys.dtype))
        values.index_copy_(1, self._slots, value.transpose(0, 1).to(keys.dtype))
        return self._attend(query.to(keys.dtype), keys, values, self._packed, scale, window).to(query.dtype)


class SplitAttention:
    """The first rows by one attention, the others by another. Implements serving.engine.interface.AttentionFunction."""

    def __init__(self, num_first: int, first: AttentionFunction, others: AttentionFunction) -> None:
        self._num_first, self._first, self._others = num_first, first, others

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        at = self._num_first
        first = self._first(layer, query[:at], key[:at], value[:at], scale, window)
        others = self._others(layer, query[at:], key[at:], value[at:], scale, window)
        return torch.cat((first, others))


def step_attention(
    memory: KVMemory, spans: Sequence[AttentionSpan], num_single: int, slots: Tensor, kernel: Kernel
) -> AttentionFunction:
    """Attention of one step: the rows of the first `num_single` spans one by one, the other spans as chunks."""
    device = slots.device
    singles, chunks = spans[:num_single], spans[num_single:]
    num_first = singles[-1].last if singles else 0
    parts: list[AttentionFunction] = []
    if singles:
        starts = [span.first_slot for span in singles for _ in range(span.num_rows)]
        lengths = [length for span in singles for length in range(span.length - span.num_rows + 1, span.length + 1)]
        packed = _packed(range(num_first + 1), starts, lengths, 1, device)
        parts.append(PackedAttention(memory, slots[:num_first], packed, kernel))
    if chunks:
        is_causal = all(span.layout.num_two_way <= span.length - span.num_rows for span in chunks)
        if kernel.takes_chunks and is_causal:
            offsets = [span.first - num_first for span in chunks] + [chunks[-1].last - num_first]
            packed = _packed(
                offsets,
                [span.first_slot for span in chunks],
                [span.length for span in chunks],
                max(span.num_rows for span in chunks),
                device,
            )
            parts.append(PackedAttention(memory, slots[num_first:], packed, kernel))
        else:
            moved = tuple(
                AttentionSpan(s.first - num_first, s.last - num_first, s.first_slot, s.length, s.layout) for s in chunks
            )
            parts.append(StepAttention(memory, moved, slots[num_first:]))
    return parts[0] if len(parts) == 1 else SplitAttention(num_first, *parts)


def _packed(
    offsets: Sequence[int], starts: list[int], lengths: list[int], max_rows: int, device: torch.device
) -> Packed:
    numbers = numbers_to_device([*offsets, *starts, 0, *lengths], device, torch.int32)
    first, second, third = numbers.split((len(starts) + 1, len(starts) + 1, len(starts)))
    return Packed(first, second, third, max_rows, max(lengths))


def choose_kernel(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The fastest kernel that gives right results on this device."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        if flash_works_here(device, dtype):
            return FLASH
        logger.warning("torch's flash attention does not work on this device: plain attention, no CUDA graphs")
    return PADDED


@cache
@torch.inference_mode()
def flash_works_here(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel equals plain attention for sequences with gaps and out of order, as single rows and as chunks.

    One of them is longer than what the kernel reads at a time, so that splitting is tried as well.
    """
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(2, 2, 1024, 64, generator=generator).to(device, dtype)
    query = torch.randn(9, 8, 64, generator=generator).to(device, dtype)
    starts, lengths = [700, 10, 350], [311, 5, 130]
    singles = _packed(range(4), starts, lengths, 1, device)
    chunks = _packed([0, 1, 4, 9], starts, lengths, 5, device)
    try:
        single = flash(query[:3], kept[0], kept[1], singles, 0.125, None)
        chunk = flash(query, kept[0], kept[1], chunks, 0.125, None)
    except (RuntimeError, NotImplementedError):
        return False  # a card before sm80, or a build of torch without the kernel
    plain = padded(query[:3].float(), kept[0].float(), kept[1].float(), singles, 0.125, None)
    rows = [(0, 700, 311), (1, 10, 3), (2, 10, 4), (3, 10, 5), *((4 + i, 350, 126 + i) for i in range(5))]
    each = _packed(range(10), [start for _, start, _ in rows], [length for _, _, length in rows], 1, device)
    apart = padded(query.float(), kept[0].float(), kept[1].float(), each, 0.125, None)
    return _is_close(single, plain) and _is_close(chunk, apart)


def _is_close(got: Tensor, expected: Tensor) -> bool:
    error: Any = (got.float() - expected).norm() / expected.norm()
    return bool(error <= TOLERANCE)
