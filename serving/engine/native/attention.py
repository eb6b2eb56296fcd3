"""Queries, keys and values of a step's rows -> attention outputs over the KV cache's blocks; for CPUs, and a fallback.

With compiled kernels one call attends for all sequences. Without them, each sequence's blocks are gathered and torch
attends sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels import decoder_native
from kernels.decoder_native import NativeAttention
from serving.engine.interface import CacheStep, PromptLayout
from serving.engine.native.kv_memory import KVMemory
from serving.engine.native.sequence import BLOCK, two_way_end

FEW_ROWS = 8  # up to this many rows of a sequence share one small matrix with all their heads


@dataclass(frozen=True)
class AttentionSpan:
    """Rows `first:last` of a batch are tokens `length - (last - first) : length` of a sequence."""

    first: int
    last: int
    blocks: Sequence[int]  # the sequence's block table
    length: int  # tokens of the sequence up to the last of these rows
    layout: PromptLayout
    num_trained: int = 0  # tokens of a trained prefix before it

    @property
    def num_two_way(self) -> int:
        """See `two_way_end`."""
        return two_way_end(self.layout, self.num_trained)

    @property
    def num_rows(self) -> int:
        return self.last - self.first


def cache_step(memory: KVMemory, spans: Sequence[AttentionSpan]) -> CacheStep:
    """The spans as tensors on the host."""
    tables = torch.zeros((len(spans), max(-(-span.length // BLOCK) for span in spans)), dtype=torch.int32)
    for row, span in zip(tables, spans, strict=True):
        used = span.blocks[: -(-span.length // BLOCK)]
        row[: len(used)] = torch.tensor(used, dtype=torch.int32)
    first = [*(span.first for span in spans), spans[-1].last]
    return CacheStep(
        memory.keys,
        memory.values,
        memory.scales,
        torch.tensor(first, dtype=torch.int32),
        torch.tensor([span.length for span in spans], dtype=torch.int32),
        torch.tensor([span.num_two_way for span in spans], dtype=torch.int32),
        tables,
    )


class StepAttention:
    """Attention of one forward pass. Implements serving.engine.interface.AttentionFunction."""

    def __init__(self, memory: KVMemory, spans: Sequence[AttentionSpan], is_native: bool = True) -> None:
        """is_native: whether the compiled kernels may be used."""
        self._memory = memory
        self._spans = spans
        self._native: NativeAttention | None = None
        self._torch: TorchAttention | None = None
        self.cache: CacheStep | None = None
        if is_native and memory.keys.device.type == "cpu" and decoder_native.functions() is not None:
            self.cache = cache_step(memory, spans)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        if self.cache is None or query.shape[1] // key.shape[1] > decoder_native.MAX_GROUP:
            if self._torch is None:
                self._torch = TorchAttention(self._memory, self._spans)
            return self._torch(layer, query, key, value, scale, window)
        if self._native is None:
            cache = self.cache
            self._native = NativeAttention(
                cache.keys, cache.values, cache.scales, cache.first, cache.lengths, cache.two_way, cache.tables,
                query.shape[1],
            )  # fmt: skip
        return self._native(layer, query, key, value, scale, window)


class TorchAttention:
    """The same by torch's operators, on any device."""

    cache = None

    def __init__(self, memory: KVMemory, spans: Sequence[AttentionSpan]) -> None:
        self._memory = memory
        self._spans = spans
        device = memory.keys.device
        tables = [torch.tensor(span.blocks[: -(-span.length // BLOCK)], device=device) for span in spans]
        self._tables = tables
        indices = [torch.arange(span.length - span.num_rows, span.length, device=device) for span in spans]
        self._blocks = torch.cat([table[index // BLOCK] for table, index in zip(tables, indices, strict=True)])
        self._offsets = torch.cat(indices) % BLOCK
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        memory, given = self._memory, query.dtype
        memory.store(layer, self._blocks, self._offsets, key, value)
        kept = torch.float32 if memory.scales is not None else memory.keys.dtype
        query = query.to(kept)  # the kernels want one type
        # the query heads that share a key head become rows of one small matrix, since the kernel would otherwise read
        # the keys once for each query head: [rows, kv_heads, heads of each, head_dim]
        grouped = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
        outs: list[Tensor] = []
        for number, span in enumerate(self._spans):
            keys, values = (
                past[None] for past in memory.gather(layer, self._tables[number], span.length)
            )  # [1, kv_heads, length, head_dim]
            mask = self._mask(number, window)
            if span.num_rows == 1:
                if window and span.length > window:
                    keys, values = keys[:, :, -window:], values[:, :, -window:]
                one = scaled_dot_product_attention(grouped[None, span.first], keys, values, scale=scale)
                outs.append(one.reshape(1, *query.shape[1:]))
            elif span.num_rows <= FEW_ROWS and mask is not None:
                outs.append(_attend_few(grouped[span.first : span.last], keys, values, mask, scale))
            else:
                rows = query[None, span.first : span.last].transpose(1, 2)  # [1, heads, rows, head_dim]
                many = scaled_dot_product_attention(
                    rows, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=True
                )
                outs.append(many[0].transpose(0, 1))
        return torch.cat(outs).to(given)

    def _mask(self, number: int, window: int | None) -> Tensor | None:
        """[rows, length], true where a row attends; None for causal attention from the first token on."""
        span = self._spans[number]
        if span.length == span.num_rows and span.num_two_way == 0 and not window:
            return None
        known = self._masks.get((number, window))
        if known is None:
            known = _visible(span, window, self._offsets.device)
            self._masks[number, window] = known
        return known


def _attend_few(grouped: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """A few rows of one sequence, all query heads of a key head in one small matrix.

    grouped: [rows, kv_heads, heads of each, head_dim]; mask: [rows, length]. Returns [rows, heads, head_dim].
    """
    num_rows, num_kv_heads, num_each, head_dim = grouped.shape
    stacked = grouped.permute(1, 2, 0, 3).reshape(1, num_kv_heads, num_each * num_rows, head_dim)
    out = scaled_dot_product_attention(stacked, keys, values, mask.repeat(num_each, 1), scale=scale)
    return out.view(num_kv_heads, num_each, num_rows, head_dim).permute(2, 0, 1, 3).flatten(1, 2)


def _visible(span: AttentionSpan, window: int | None, device: torch.device) -> Tensor:
    rows = torch.arange(span.length - span.num_rows, span.length, device=device)[:, None]
    columns = torch.arange(span.length, device=device)[None, :]
    visible = columns <= rows
    if window:
        visible &= columns > rows - window
    if span.num_two_way:
        visible |= (columns < span.num_two_way) & (rows < span.num_two_way)
    return visible
