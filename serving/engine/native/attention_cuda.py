"""Attention for all sequences of a step in one or two calls, as a GPU wants it. Knows places and rows; no policy.

`StepAttention` goes from sequence to sequence, which costs a CPU nothing and a GPU a launch for each. Here a row that
is alone (an answer's next token, or a guess at what follows it) is a sequence of its own: it sees the `index + 1`
places from its sequence's first on. Chunks of prompts are a second call. Both are torch's own flash kernel
(FlashAttention 2, in every CUDA wheel, sm80 and newer).

The kernel takes packed sequences by `cum_seq_k`, the place where each one begins, and `seqused_k`, how many places of
it count. It looks sequence i up at `cum_seq_k[i]` and, given `seqused_k`, reads no end from `cum_seq_k[i + 1]`: so the
extents may lie anywhere in any order, and no block table and no gather is needed. `flash_works_here` asks the device.
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
from serving.engine.native.transfer import send_numbers

logger = logging.getLogger(__name__)
TOLERANCE = 2e-2  # of flash against plain attention, relative, in 16 bits


@dataclass(frozen=True)
class Packed:
    """Rows of several sequences end to end, described on the device."""

    offsets: Tensor  # [sequences + 1] int32: where each one's rows begin, and the number of rows
    starts: Tensor  # [sequences + 1] int32: each one's first place; the last number counts for nothing
    lengths: Tensor  # [sequences] int32: places of it that its last row sees
    max_rows: int  # of one sequence
    max_length: int  # an upper bound of `lengths`


@dataclass(frozen=True)
class Kernel:
    """A way to attend.

    attend: query [rows, heads, head_dim], keys and values [kv_heads, places, head_dim], the rows, scale, window
    -> query's shape. Rows of one sequence see it causally.
    """

    attend: Callable[[Tensor, Tensor, Tensor, Packed, float, int | None], Tensor]
    takes_chunks: bool  # else one row a sequence, at most


def flash(query: Tensor, keys: Tensor, values: Tensor, packed: Packed, scale: float, window: int | None) -> Tensor:
    """torch's flash kernel, for float16 and bfloat16.

    With one row a sequence it is told neither of a window nor of causality where there is none to tell: only then does
    it share keys among the heads of a group and split long sequences over the whole card.
    `torch.nn.attention.varlen` calls the same operator, and fills a tensor that nobody reads at each call.
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
    assert packed.max_rows == 1, "chunks are attended one by one where flash does not work"
    columns = torch.arange(packed.max_length, device=query.device)
    visible = columns < packed.lengths[:, None]
    if window is not None:
        visible &= columns >= packed.lengths[:, None] - window
    # what is not visible is read from the sequence's own last place: elsewhere there may be NaN, and 0 * NaN is NaN
    places = packed.starts[:-1, None] + torch.minimum(columns, packed.lengths[:, None] - 1)
    grouped = query.reshape(len(query), keys.shape[0], -1, query.shape[-1])
    out = scaled_dot_product_attention(
        grouped,
        keys[:, places].transpose(0, 1),
        values[:, places].transpose(0, 1),
        visible[:, None, None],
        scale=scale,
    )
    return out.reshape(query.shape)


FLASH = Kernel(flash, takes_chunks=True)
PADDED = Kernel(padded, takes_chunks=False)


class PackedAttention:
    """One kernel for all rows. Implements serving.engine.interface.AttentionFunction."""

    def __init__(self, memory: KVMemory, places: Tensor, packed: Packed, kernel: Kernel) -> None:
        """places: [rows] int64, where each row's key and value are stored."""
        self._memory, self._places, self._packed, self._attend = memory, places, packed, kernel.attend

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        keys, values = self._memory.keys[layer], self._memory.values[layer]
        # the memory may be narrower than the rows, and the kernels want one type
        keys.index_copy_(1, self._places, key.transpose(0, 1).to(keys.dtype))
        values.index_copy_(1, self._places, value.transpose(0, 1).to(keys.dtype))
        return self._attend(query.to(keys.dtype), keys, values, self._packed, scale, window).to(query.dtype)


class TwoAttentions:
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
    memory: KVMemory, spans: Sequence[AttentionSpan], num_single: int, places: Tensor, kernel: Kernel
) -> AttentionFunction:
    """For one step: the rows of its first `num_single` spans each for itself, the other spans as chunks."""
    device = places.device
    singles, chunks = spans[:num_single], spans[num_single:]
    num_first = singles[-1].last if singles else 0
    parts: list[AttentionFunction] = []
    if singles:
        starts = [span.place for span in singles for _ in range(span.num_rows)]
        lengths = [length for span in singles for length in range(span.length - span.num_rows + 1, span.length + 1)]
        packed = _packed(range(num_first + 1), starts, lengths, 1, device)
        parts.append(PackedAttention(memory, places[:num_first], packed, kernel))
    if chunks:
        is_causal = all(span.layout.num_two_way <= span.length - span.num_rows for span in chunks)
        if kernel.takes_chunks and is_causal:
            offsets = [span.first - num_first for span in chunks] + [chunks[-1].last - num_first]
            packed = _packed(
                offsets,
                [span.place for span in chunks],
                [span.length for span in chunks],
                max(span.num_rows for span in chunks),
                device,
            )
            parts.append(PackedAttention(memory, places[num_first:], packed, kernel))
        else:
            moved = tuple(
                AttentionSpan(s.first - num_first, s.last - num_first, s.place, s.length, s.layout) for s in chunks
            )
            parts.append(StepAttention(memory, moved, places[num_first:]))
    return parts[0] if len(parts) == 1 else TwoAttentions(num_first, *parts)


def _packed(
    offsets: Sequence[int], starts: list[int], lengths: list[int], max_rows: int, device: torch.device
) -> Packed:
    numbers = send_numbers([*offsets, *starts, 0, *lengths], device, torch.int32)
    first, second, third = numbers.split((len(starts) + 1, len(starts) + 1, len(starts)))
    return Packed(first, second, third, max_rows, max(lengths))


def choose_kernel(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The fastest one that gives right numbers here."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        if flash_works_here(device, dtype):
            return FLASH
        logger.warning("torch's flash attention does not work on this device: plain attention, no CUDA graphs")
    return PADDED


@cache
@torch.inference_mode()
def flash_works_here(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel finds sequences that lie apart and out of order, alone and as chunks, as plain attention does.

    One of them is longer than what the kernel reads at a time, so that splitting it is tried as well.
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
