"""Packed weights -> linear layers of the compiled kernels, float32 in and out; stored embeddings. On CPUs."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels import native_library
from kernels.layouts import PackedLinear


class LinearStruct(ctypes.Structure):
    """`struct linear` of kernels/native/linear.h."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


def linear_struct(packed: PackedLinear) -> LinearStruct:
    """Points into the packed tensors, which must outlive it."""
    scales, bias = packed.scales, packed.bias
    return LinearStruct(
        packed.format,
        packed.outputs,
        packed.inputs,
        packed.weights.data_ptr(),
        None if scales is None else scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
    )


@cache
def _functions(instruction_set: str | None) -> ctypes.CDLL:
    library = native_library.load(instruction_set)
    if library is None:
        raise RuntimeError("the native kernels are not compiled")
    library.linear_workspace.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.linear_workspace.restype = ctypes.c_size_t
    library.linear_forward.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    library.linear_forward.restype = None
    return library


def workspace(num_bytes: int) -> tuple[Tensor, int]:
    """Memory for one call, and its first address that divides by 64."""
    space = torch.empty(num_bytes + 64, dtype=torch.uint8)
    return space, space.data_ptr() + -space.data_ptr() % 64


class NativeLinear(nn.Module):
    """One layer over packed weights."""

    def __init__(self, packed: PackedLinear, instruction_set: str | None = None) -> None:
        """instruction_set: None takes the fastest that this CPU has. Raises RuntimeError without compiled kernels."""
        super().__init__()
        self.packed = packed
        self._library = _functions(instruction_set)
        self.struct = linear_struct(packed)
        self._address = ctypes.addressof(self.struct)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs] float32."""
        rows = x.reshape(-1, x.shape[-1])
        rows = rows.float() if rows.dtype != torch.float32 else rows
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        out = torch.empty(len(rows), self.packed.outputs, dtype=torch.float32)
        if len(rows):
            _space, start = workspace(self._library.linear_workspace(self._address, len(rows)))
            self._library.linear_forward(
                self._address, rows.data_ptr(), rows.stride(0), out.data_ptr(), self.packed.outputs, len(rows),
                start,
            )  # fmt: skip
        return out.view(*x.shape[:-1], -1)


class StoredEmbedding(nn.Module):
    """An embedding in its stored type; only the rows that are looked up are converted."""

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self._table = embedding.weight.detach()  # no parameter: it keeps its type when the rest is cast
        self._dtype = dtype

    @property
    def weight(self) -> Tensor:
        return self._table

    def forward(self, token_ids: Tensor) -> Tensor:
        """[...] int64 -> [..., hidden]"""
        return functional.embedding(token_ids, self._table).to(self._dtype)
