"""Queries, keys and values of a step's rows -> attention outputs, in one or two kernel calls for all sequences.

`StepAttention` goes from sequence to sequence, which costs a GPU one launch each. Here a decode row (a sequence's next
token, or a draft token behind it) counts as a sequence of its own: it attends to the first `index + 1` tokens of its
block table. Chunks of prompts are a second call. On a GPU both are Triton kernels over the cache's blocks
(kernels/attention_triton.py); `padded` is the same by torch's operators, for tests without a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from serving.engine.interface import AttentionFunction, NetworkShape
from serving.engine.native.attention import AttentionSpan, TorchAttention
from serving.engine.native.device import numbers_to_device
from serving.engine.native.kv_memory import KVLayer, KVMemory
from serving.engine.native.sequence import BLOCK

logger = logging.getLogger(__name__)
TOLERANCE = 2e-2  # of a kernel against plain attention, relative, in 16 bits


@dataclass(frozen=True)
class Packed:
    """Rows of several sequences end to end, described on the device."""

    offsets: Tensor  # [sequences + 1] int32: where each one's rows begin, and the number of rows
    tables: Tensor  # [sequences, max_blocks] int32
    lengths: Tensor  # [sequences] int32: tokens that its last row attends to
    max_rows: int  # of one sequence
    max_length: int  # an upper bound of `lengths`


@dataclass(frozen=True)
class Kernel:
    """An implementation of packed attention.

    attend: query [rows, heads, head_dim], a layer of the cache, the rows, scale, window -> query's shape. Rows attend
    to their own sequence, causally.
    """

    attend: Callable[[Tensor, KVLayer, Packed, float, int | None], Tensor]
    store: Callable[[KVMemory, int, Tensor, Tensor, Tensor, Tensor], None]  # as `KVMemory.store`
    takes_chunks: bool  # else at most one row a sequence


def triton(query: Tensor, layer: KVLayer, packed: Packed, scale: float, window: int | None) -> Tensor:
    """Single rows split over the length of their sequences, or chunks of prompts."""
    from kernels.attention_triton import decode, prefill  # Triton comes with torch's CUDA wheels only

    out: Tensor
    if packed.max_rows == 1:
        out = decode(query, *layer, packed.tables, packed.lengths, packed.max_length, scale, window or 0)
    else:
        out = prefill(query, *layer, packed.offsets, packed.tables, packed.lengths, packed.max_rows, scale, window or 0)
    return out


def padded(query: Tensor, layer: KVLayer, packed: Packed, scale: float, window: int | None) -> Tensor:
    """Single rows on any device: every sequence is gathered and padded to the longest."""
    assert packed.max_rows == 1, "chunks go from sequence to sequence"
    columns = torch.arange(packed.max_length, device=query.device)
    visible = columns < packed.lengths[:, None]
    if window is not None:
        visible &= columns >= packed.lengths[:, None] - window
    # masked columns read the sequence's own last token: elsewhere there may be NaN, and 0 * NaN is NaN
    columns = torch.minimum(columns, packed.lengths[:, None] - 1)
    blocks = packed.tables.long().gather(1, columns // BLOCK)
    slots = columns % BLOCK
    past_keys = layer.keys.permute(0, 3, 1, 2)[blocks, slots].transpose(1, 2)  # [rows, kv_heads, length, head_dim]
    past_values = layer.values.transpose(1, 2)[blocks, slots].transpose(1, 2)
    if layer.scales is not None:
        of_keys, of_values = (scales.transpose(1, 2)[blocks, slots].transpose(1, 2) for scales in layer.scales)
        past_keys = (past_keys * of_keys[..., None]).to(query.dtype)
        past_values = (past_values * of_values[..., None]).to(query.dtype)
    grouped = query.reshape(len(query), past_keys.shape[1], -1, query.shape[-1])
    out = scaled_dot_product_attention(grouped, past_keys, past_values, visible[:, None, None], scale=scale)
    return out.reshape(query.shape)


def triton_store(memory: KVMemory, layer: int, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
    """Keys and values in one launch."""
    from kernels.ops_triton import store

    kept = memory.layer(layer)
    if kept.scales is None:
        key, value = key.to(kept.keys.dtype), value.to(kept.keys.dtype)
    store(*kept, blocks, offsets, key, value)


TRITON = Kernel(triton, triton_store, takes_chunks=True)
PADDED = Kernel(padded, KVMemory.store, takes_chunks=False)


class PackedAttention:
    """One kernel for all rows. Implements serving.engine.interface.AttentionFunction."""

    cache = None

    def __init__(self, memory: KVMemory, blocks: Tensor, offsets: Tensor, packed: Packed, kernel: Kernel) -> None:
        """blocks, offsets: [rows] int64, where each row's key and value are stored."""
        self._memory, self._blocks, self._offsets, self._packed = memory, blocks, offsets, packed
        self._kernel = kernel

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        kept = self._memory.layer(layer)
        self._kernel.store(self._memory, layer, self._blocks, self._offsets, key, value)
        # the memory may be narrower than the rows, and the kernels want one type
        narrow = query if kept.scales is not None else query.to(kept.keys.dtype)
        out = self._kernel.attend(narrow, kept, self._packed, scale, window)
        return out.to(query.dtype)


class SplitAttention:
    """The first rows by one attention, the others by another. Implements serving.engine.interface.AttentionFunction."""

    cache = None

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
    memory: KVMemory, spans: Sequence[AttentionSpan], num_single: int, kernel: Kernel
) -> AttentionFunction:
    """Attention of one step: the rows of the first `num_single` spans one by one, the other spans as chunks."""
    singles, chunks = spans[:num_single], spans[num_single:]
    num_first = singles[-1].last if singles else 0
    parts: list[AttentionFunction] = []
    if singles:
        apart = [
            AttentionSpan(row, row + 1, span.blocks, span.length - span.last + row + 1, span.layout)
            for span in singles
            for row in range(span.first, span.last)
        ]
        parts.append(_packed_attention(memory, apart, kernel))
    if chunks:
        moved = [replace(s, first=s.first - num_first, last=s.last - num_first) for s in chunks]
        is_causal = all(span.num_two_way <= span.length - span.num_rows for span in chunks)
        takes = kernel.takes_chunks and is_causal
        parts.append(_packed_attention(memory, moved, kernel) if takes else TorchAttention(memory, moved))
    return parts[0] if len(parts) == 1 else SplitAttention(num_first, *parts)


def _packed_attention(memory: KVMemory, spans: Sequence[AttentionSpan], kernel: Kernel) -> PackedAttention:
    """One copy to the device for all numbers."""
    max_blocks = max(-(-span.length // BLOCK) for span in spans)
    tables = [number for s in spans for number in (*s.blocks[:max_blocks], *[0] * (max_blocks - len(s.blocks)))]
    indices = [(s, index) for s in spans for index in range(s.length - s.num_rows, s.length)]
    parts = (
        [*(s.first for s in spans), spans[-1].last],
        tables,
        [s.length for s in spans],
        [s.blocks[index // BLOCK] for s, index in indices],
        [index % BLOCK for _, index in indices],
    )
    numbers = numbers_to_device([number for part in parts for number in part], memory.keys.device, torch.int32)
    offsets, table, lengths, blocks, slots = numbers.split([len(part) for part in parts])
    packed = Packed(
        offsets,
        table.view(len(spans), max_blocks),
        lengths,
        max(span.num_rows for span in spans),
        max(span.length for span in spans),
    )
    return PackedAttention(memory, blocks.long(), slots.long(), packed, kernel)


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The fastest kernel that gives right results on this device for a cache of this type.

    Triton's tiles are powers of two.
    """
    kept = (torch.float16, torch.bfloat16, torch.int8)
    if device.type == "cuda" and dtype in kept and head_dim & (head_dim - 1) == 0:
        if triton_works_here(device, dtype):
            return TRITON
        logger.warning("Triton kernels do not work on this device: plain attention, no CUDA graphs")
    return PADDED


@torch.inference_mode()
def triton_works_here(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels equal plain attention for single rows and for chunks, of short and of long sequences."""
    generator = torch.Generator().manual_seed(0)
    memory = KVMemory(NetworkShape(1, 8, 2, 128, 1024, 1, 1, 1024), 63, device, dtype)
    places = torch.arange(64 * BLOCK, device=device)
    blocks, slots = places // BLOCK, places % BLOCK
    computed = torch.float16 if dtype == torch.int8 else dtype
    key, value = torch.randn(2, 64 * BLOCK, 2, 128, generator=generator).to(device, computed)
    query = torch.randn(9, 8, 128, generator=generator).to(device, computed)
    tables = torch.randperm(64, generator=generator)[:60].view(3, 20).int().to(device)
    lengths = torch.tensor([311, 5, 130], dtype=torch.int32, device=device)

    def packed(offsets: list[int], rows: int) -> Packed:
        return Packed(torch.tensor(offsets, dtype=torch.int32, device=device), tables, lengths, rows, 320)

    try:
        triton_store(memory, 0, blocks, slots, key, value)
        kept = memory.layer(0)
        single = triton(query[:3], kept, packed([0, 1, 2, 3], 1), 0.1, None)
        chunk = triton(query, kept, packed([0, 1, 4, 9], 5), 0.1, None)
    except Exception as error:  # noqa: BLE001
        # no compiler, an old driver, a card without the instructions: Triton documents no exception types
        logger.warning("Triton: %s", str(error).partition("\n")[0])
        return False
    memory.store(0, blocks, slots, key, value)
    exact = memory.layer(0)
    if exact.scales is None:
        exact = KVLayer(exact.keys.float(), exact.values.float(), None)
    plain = padded(query[:3].float(), exact, packed([0, 1, 2, 3], 1), 0.1, None)
    last = padded(query[[0, 3, 8]].float(), exact, packed([0, 1, 2, 3], 1), 0.1, None)
    return _is_close(single, plain) and _is_close(chunk[[0, 3, 8]], last)


def _is_close(got: Tensor, expected: Tensor) -> bool:
    error = (got.float() - expected).norm() / expected.norm()
    return bool(error <= TOLERANCE)
