"""The KV memory and attention over it. Knows places and rows; knows no policy and no network.

Each sequence's keys and values lie in one contiguous run of places, so attention reads them where they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from serving.engine.cache import Move
from serving.engine.types import NetworkShape, PromptLayout


class KVMemory:
    """Keys and values of `num_places` tokens, `[layers, kv_heads, places, head_dim]` each, allocated once."""

    def __init__(self, shape: NetworkShape, num_places: int, device: torch.device, dtype: torch.dtype) -> None:
        size = (shape.num_layers, shape.num_kv_heads, num_places, shape.head_dim)
        self.keys = torch.empty(size, device=device, dtype=dtype)
        self.values = torch.empty(size, device=device, dtype=dtype)

    @staticmethod
    def bytes_per_token(shape: NetworkShape, dtype: torch.dtype) -> int:
        return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize

    def carry_out(self, moves: Iterable[Move]) -> None:
        """Copy runs of places, in order."""
        for move in moves:
            overlap = abs(move.target - move.source) < move.length
            for memory in (self.keys, self.values):
                source = memory[:, :, move.source : move.source + move.length]
                memory[:, :, move.target : move.target + move.length] = source.clone() if overlap else source


@dataclass(frozen=True)
class AttentionSpan:
    """Rows `first:last` of a batch are tokens `length - (last - first) : length` of the sequence at `place`."""

    first: int
    last: int
    place: int
    length: int  # tokens of the sequence that these rows may see, themselves included
    layout: PromptLayout

    @property
    def num_rows(self) -> int:
        return self.last - self.first


class StepAttention:
    """Attention for one forward pass: stores each layer's new keys and values, then lets every row see its own sequence.

    Implements serving.engine.types.Attend.
    """

    def __init__(self, memory: KVMemory, spans: tuple[AttentionSpan, ...], places: Tensor) -> None:
        """places: [rows] int64, where each row's key and value are stored."""
        self._memory = memory
        self._spans = spans
        self._places = places
        self._masks: dict[tuple[AttentionSpan, int | None], Tensor | None] = {}

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        keys, values = self._memory.keys[layer], self._memory.values[layer]  # [kv_heads, places, head_dim]
        keys.index_copy_(1, self._places, key.transpose(0, 1))
        values.index_copy_(1, self._places, value.transpose(0, 1))
        out = torch.empty_like(query)
        for span in self._spans:
            begin = span.place + (max(0, span.length - window) if window and span.num_rows == 1 else 0)
            end = span.place + span.length
            past_keys, past_values = keys[None, :, begin:end], values[None, :, begin:end]
            if span.num_rows == 1:
                out[span.first] = _attend_one(query[span.first], past_keys, past_values, scale)
            else:
                rows = query[None, span.first : span.last].transpose(1, 2)  # [1, heads, rows, head_dim]
                mask = self._mask(span, window)
                out[span.first : span.last] = scaled_dot_product_attention(
                    rows, past_keys, past_values, mask, is_causal=mask is None, scale=scale, enable_gqa=True
                )[0].transpose(0, 1)
        return out

    def _mask(self, span: AttentionSpan, window: int | None) -> Tensor | None:
        """[rows, length] of what each row may see; None where plain causal attention from the first token on will do."""
        if span.length == span.num_rows and span.layout.num_two_way == 0 and not window:
            return None
        known = self._masks.get((span, window))
        if known is None:
            known = _visible(span, window, self._places.device)
            self._masks[span, window] = known
        return known


def _attend_one(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One row against all keys. The query heads that share a key head become rows of one small matrix, since the
    kernel would otherwise read the keys once per query head. [heads, head_dim] -> [heads, head_dim]"""
    num_kv_heads, head_dim = keys.shape[1], query.shape[-1]
    grouped = query.view(1, num_kv_heads, -1, head_dim)
    return scaled_dot_product_attention(grouped, keys, values, scale=scale).reshape(-1, head_dim)


def _visible(span: AttentionSpan, window: int | None, device: torch.device) -> Tensor:
    rows = torch.arange(span.length - span.num_rows, span.length, device=device)[:, None]
    columns = torch.arange(span.length, device=device)[None, :]
    visible = columns <= rows
    if window:
        visible &= columns > rows - window
    if span.layout.num_two_way:
        visible |= (columns < span.layout.num_two_way) & (rows < span.layout.num_two_way)
    return visible
