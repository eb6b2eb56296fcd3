"""Blocks of the KV cache -> the memory of their keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from serving.engine.interface import NetworkShape
from serving.engine.native.sequence import BLOCK


class KVLayer(NamedTuple):
    """The cache of one layer."""

    keys: Tensor  # [blocks, kv_heads, head_dim, BLOCK]
    values: Tensor  # [blocks, kv_heads, BLOCK, head_dim]
    scales: tuple[Tensor, Tensor] | None  # of int8: [blocks, kv_heads, BLOCK] float32 each


class KVMemory:
    """Keys and values of `num_blocks` blocks and of one more that belongs to no sequence, allocated once.

    keys: [layers, blocks, kv_heads, head_dim, BLOCK], so that the scores of a block's tokens are computed side by side;
    values: [layers, blocks, kv_heads, BLOCK, head_dim]. In int8 every token and head has a scale, [layers, blocks,
    kv_heads, BLOCK] float32.
    """

    def __init__(self, shape: NetworkShape, num_blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        size = (shape.num_layers, num_blocks + 1, shape.num_kv_heads)
        self.scratch_block = num_blocks
        self.keys = torch.empty((*size, shape.head_dim, BLOCK), device=device, dtype=dtype)
        self.values = torch.empty((*size, BLOCK, shape.head_dim), device=device, dtype=dtype)
        self.scales: tuple[Tensor, Tensor] | None = None
        if dtype == torch.int8:
            keys, values = torch.empty((2, *size, BLOCK), device=device, dtype=torch.float32)
            self.scales = keys, values

    @staticmethod
    def bytes_per_token(shape: NetworkShape, dtype: torch.dtype) -> int:
        bytes_per_head = shape.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
        return 2 * shape.num_layers * shape.num_kv_heads * bytes_per_head

    def layer(self, index: int) -> KVLayer:
        """Views of one layer."""
        scales = None if self.scales is None else (self.scales[0][index], self.scales[1][index])
        return KVLayer(self.keys[index], self.values[index], scales)

    def store(self, layer: int, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value: [rows, kv_heads, head_dim] of the tokens at `offsets` in `blocks`, [rows] int64 each."""
        if self.scales is not None:
            for scales, tensor in zip(self.scales, (key, value), strict=True):
                scales[layer][blocks, :, offsets] = tensor.float().abs().amax(dim=-1) / 127
            key, value = (
                (tensor / scales[layer][blocks, :, offsets].clamp(min=1e-30)[..., None]).round()
                for scales, tensor in zip(self.scales, (key, value), strict=True)
            )
        self.keys[layer].permute(0, 3, 1, 2)[blocks, offsets] = key.to(self.keys.dtype)
        self.values[layer].transpose(1, 2)[blocks, offsets] = value.to(self.values.dtype)

    def copy(self, source: int, target: int) -> None:
        """A block's keys and values of all layers."""
        for memory in (self.keys, self.values, *(self.scales or ())):
            memory[:, target].copy_(memory[:, source])

    def gather(self, layer: int, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence's first `length` tokens, [kv_heads, length, head_dim] each; float32 if they are
        kept in int8. blocks: its table, int64."""
        keys = self.keys[layer][blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :length]
        values = self.values[layer][blocks].transpose(0, 1).flatten(1, 2)[:, :length]
        if self.scales is not None:
            of_keys, of_values = (
                scales[layer][blocks].transpose(0, 1).flatten(1)[:, :length] for scales in self.scales
            )
            return keys * of_keys[..., None], values * of_values[..., None]
        return keys, values
