"""Queries, keys and values of a step's rows -> attention outputs, over the KV cache's memory; sequence by sequence.

Each sequence's keys and values are contiguous, so attention reads them where they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from serving.engine.interface import NetworkShape, PromptLayout
from serving.engine.native.kv_cache import Move

FEW_ROWS = 8  # up to this many rows of a sequence share one small matrix with all their heads


class KVMemory:
    """Keys and values of `num_slots` tokens, `[layers, kv_heads, slots, head_dim]` each, allocated once."""

    def __init__(self, shape: NetworkShape, num_slots: int, device: torch.device, dtype: torch.dtype) -> None:
        size = (shape.num_layers, shape.num_kv_heads, num_slots, shape.head_dim)
        self.keys = torch.empty(size, device=device, dtype=dtype)
        self.values = torch.empty(size, device=device, dtype=dtype)

    @staticmethod
    def bytes_per_token(shape: NetworkShape, dtype: torch.dtype) -> int:
        return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize

    def apply(self, moves: Iterable[Move]) -> None:
        """Copy ranges of slots, in order."""
        for move in moves:
            overlap = abs(move.target - move.source) < move.length
            for memory in (self.keys, self.values):
                source = memory[:, :, move.source : move.source + move.length]
                memory[:, :, move.target : move.target + move.length] = source.clone() if overlap else source


@dataclass(frozen=True)
class AttentionSpan:
    """Rows `first:last` of a batch are tokens `length - (last - first) : length` of the sequence at `first_slot`."""

    first: int
    last: int
    first_slot: int
    length: int  # tokens of the sequence up to the last of these rows
    layout: PromptLayout

    @property
    def num_rows(self) -> int:
        return self.last - self.first


class StepAttention:
    """Attention of one forward pass: stores each layer's keys and values, then attends sequence by sequence.

    Implements serving.engine.interface.AttentionFunction.
    """

    def __init__(self, memory: KVMemory, spans: tuple[AttentionSpan, ...], slots: Tensor) -> None:
        """slots: [rows] int64, where each row's key and value are stored."""
        self._memory = memory
        self._spans = spans
        self._slots = slots
        # sliced for all layers at once: for a small model, slicing layer by layer takes as long as attending
        self._past = [
            tuple(
                kept[:, None, :, span.first_slot : span.first_slot + span.length].unbind(0)
                for kept in (memory.keys, memory.values)
            )
            for span in spans
        ]
        self._masks: dict[tuple[AttentionSpan, int | None], Tensor | None] = {}

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        kept = self._memory.keys.dtype  # may be narrower than the rows' type, and the kernels want one type
        self._memory.keys[layer].index_copy_(1, self._slots, key.transpose(0, 1).to(kept))
        self._memory.values[layer].index_copy_(1, self._slots, value.transpose(0, 1).to(kept))
        given, query = query.dtype, query.to(kept)
        # the query heads that share a key head become rows of one small matrix, since the kernel would otherwise read
        # the keys once for each query head: [rows, 1, kv_heads, heads of each, head_dim]
        grouped = query.reshape(len(query), 1, key.shape[1], -1, query.shape[-1])
        outs: list[Tensor] = []
        for span, (keys, values) in zip(self._spans, self._past, strict=True):
            past_keys, past_values = keys[layer], values[layer]  # [1, kv_heads, length, head_dim]
            if span.num_rows == 1:
                if window and span.length > window:
                    past_keys, past_values = past_keys[:, :, -window:], past_values[:, :, -window:]
                one = scaled_dot_product_attention(grouped[span.first], past_keys, past_values, scale=scale)
                outs.append(one.reshape(1, *query.shape[1:]))
            elif span.num_rows <= FEW_ROWS and (mask := self._mask(span, window)) is not None:
                outs.append(_attend_few(grouped[span.first : span.last, 0], past_keys, past_values, mask, scale))
            else:
                rows = query[None, span.first : span.last].transpose(1, 2)  # [1, heads, rows, head_dim]
                mask = self._mask(span, window)
                many = scaled_dot_product_attention(
                    rows, past_keys, past_values, mask, is_causal=mask is None, scale=scale, enable_gqa=True
                )
                outs.append(many[0].transpose(0, 1))
        return torch.cat(outs).to(given)

    def _mask(self, span: AttentionSpan, window: int | None) -> Tensor | None:
        """[rows, length], true where a row attends; None for causal attention from the first token on."""
        if span.length == span.num_rows and span.layout.num_two_way == 0 and not window:
            return None
        known = self._masks.get((span, window))
        if known is None:
            known = _visible(span, window, self._slots.device)
            self._masks[span, window] = known
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
    if span.layout.num_two_way:
        visible |= (columns < span.layout.num_two_way) & (rows < span.layout.num_two_way)
    return visible
