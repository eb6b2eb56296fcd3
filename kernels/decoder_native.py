"""A step's rows over a KV cache in blocks -> attention, all layers of a decoder, or sampled tokens, by the compiled
kernels.

See kernels/native/attention.h, kernels/native/decoder.h and kernels/native/sample.c.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels import native_library
from kernels.layouts import PackedLinear
from kernels.linears_native import LinearStruct, linear_struct, workspace

KV_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
MAX_GROUP = 48  # query heads of a key head


class AttentionStruct(ctypes.Structure):
    """`struct attention_step`."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("rows", "spans", "heads", "kv_heads", "head_dim", "kv_type", "max_blocks")
        ),
        *((name, ctypes.c_void_p) for name in ("first", "lengths", "two_way", "tables")),
    )


class KVLayerStruct(ctypes.Structure):
    """`struct kv_layer`."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales"))


@cache
def functions(instruction_set: str | None = None) -> ctypes.CDLL | None:
    """The library with the types of its functions; None without compiled kernels."""
    library = native_library.load(instruction_set)
    if library is None:
        return None
    pointer = ctypes.c_void_p
    library.attention_workspace.argtypes = [pointer]
    library.attention_workspace.restype = ctypes.c_size_t
    library.store_keys_values.argtypes = [pointer, pointer, pointer, pointer, ctypes.c_int64]
    library.store_keys_values.restype = None
    library.attention_forward.argtypes = [
        pointer, pointer, pointer, ctypes.c_int64, pointer, ctypes.c_int64, ctypes.c_float, ctypes.c_int, pointer,
    ]  # fmt: skip
    library.attention_forward.restype = None
    library.sampling_workspace.argtypes = [ctypes.c_int, ctypes.c_int]
    library.sampling_workspace.restype = ctypes.c_size_t
    library.sample_rows.argtypes = [
        pointer, ctypes.c_int64, ctypes.c_int, ctypes.c_int, pointer, pointer, pointer,
    ]  # fmt: skip
    library.sample_rows.restype = None
    return library


def sample(logits: Tensor, settings: Tensor, library: ctypes.CDLL) -> Tensor:
    """logits: [rows, vocabulary] float32 on the CPU; settings: [rows, 5] float64, the temperature, top_p, min_p, top_k
    (at most the vocabulary) and a uniform number. Returns [rows] int32, one token each."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocabulary = logits.shape
    chosen = torch.empty(rows, dtype=torch.int32)
    memory, address = workspace(library.sampling_workspace(rows, vocabulary))
    library.sample_rows(
        logits.data_ptr(), logits.stride(0), rows, vocabulary, settings.data_ptr(), address, chosen.data_ptr()
    )
    del memory  # only now
    return chosen


class NativeAttention:
    """Attention of one forward pass: stores each layer's keys and values, then attends."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        scales: tuple[Tensor, Tensor] | None,
        first: Tensor,
        lengths: Tensor,
        two_way: Tensor,
        tables: Tensor,
        num_heads: int,
        instruction_set: str | None = None,
    ) -> None:
        """keys: [layers, blocks, kv_heads, head_dim, BLOCK]; values: [layers, blocks, kv_heads, BLOCK, head_dim];
        scales of int8: [layers, blocks, kv_heads, BLOCK] float32. first: [spans + 1], the rows of each span; lengths,
        two_way: [spans]; tables: [spans, max_blocks], all int32. Raises RuntimeError where the kernels cannot be used.
        """
        library = functions(instruction_set)
        num_kv_heads, head_dim = keys.shape[2], keys.shape[3]
        if library is None or num_heads // num_kv_heads > MAX_GROUP:
            raise RuntimeError("the native kernels are not compiled, or have too few registers for this network")
        self._library = library
        self.keys, self.values, self.scales = keys, values, scales
        self._kept = (first, lengths, two_way, tables)
        self.struct = AttentionStruct(
            int(first[-1]), len(lengths), num_heads, num_kv_heads, head_dim, KV_TYPES[keys.dtype], tables.shape[1],
            *(tensor.data_ptr() for tensor in self._kept),
        )  # fmt: skip
        self._space: tuple[Tensor, int] | None = None  # NativeDecoder has its own

    def layer(self, index: int) -> KVLayerStruct:
        """The addresses of one layer's memory."""
        scales = (None, None) if self.scales is None else tuple(scale[index].data_ptr() for scale in self.scales)
        return KVLayerStruct(self.keys[index].data_ptr(), self.values[index].data_ptr(), *scales)

    def __call__(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """query: [rows, heads, head_dim]; key, value: [rows, kv_heads, head_dim]. Returns query's shape in its type."""
        q, k, v = (tensor.float() if tensor.dtype != torch.float32 else tensor for tensor in (query, key, value))
        q, k, v = (tensor if tensor[0].is_contiguous() else tensor.contiguous() for tensor in (q, k, v))
        if k.stride(0) != v.stride(0):
            k, v = k.contiguous(), v.contiguous()
        out = torch.empty(query.shape, dtype=torch.float32)
        layer, step = self.layer(index), ctypes.byref(self.struct)
        library, memory = self._library, ctypes.byref(layer)
        if self._space is None:
            self._space = workspace(library.attention_workspace(step))
        library.store_keys_values(step, memory, k.data_ptr(), v.data_ptr(), k.stride(0))
        library.attention_forward(
            step, memory, q.data_ptr(), q.stride(0), out.data_ptr(), out.stride(0), scale, window or 0, self._space[1]
        )
        return out.to(query.dtype)


@dataclass(frozen=True)
class DecoderLayer:
    """One layer's packed products and norms, [hidden_size] float32."""

    qkv: PackedLinear
    out: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    input_norm: Tensor
    post_norm: Tensor


class LayerStruct(ctypes.Structure):
    """`struct decoder_layer`."""

    _fields_ = (
        *((name, LinearStruct) for name in ("qkv", "out", "gate_up", "down")),
        ("input_norm", ctypes.c_void_p),
        ("post_norm", ctypes.c_void_p),
    )


class DecoderStruct(ctypes.Structure):
    """`struct decoder`."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        *(
            (name, ctypes.c_int32)
            for name in ("num_layers", "hidden", "inner", "heads", "kv_heads", "head_dim", "rotated")
        ),
        ("epsilon", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
    )


class MemoryStruct(ctypes.Structure):
    """`struct kv_memory`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        ("layer_bytes", ctypes.c_int64),
        ("scale_layer_floats", ctypes.c_int64),
    )


class NativeDecoder:
    """Holds the addresses of all weights, which it keeps alive."""

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        final_norm: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_rotated: int,
        epsilon: float,
    ) -> None:
        """num_rotated: channels of each head with a rotary embedding. Raises RuntimeError without compiled kernels."""
        library = functions()
        if library is None:
            raise RuntimeError("the native kernels are not compiled")
        library.decoder_workspace.argtypes = [ctypes.c_void_p] * 2
        library.decoder_workspace.restype = ctypes.c_size_t
        library.decoder_forward.argtypes = [ctypes.c_void_p] * 6
        library.decoder_forward.restype = None
        self._library, self._kept = library, (tuple(layers), final_norm)
        self._layers = (LayerStruct * len(layers))(
            *(
                LayerStruct(
                    *(linear_struct(packed) for packed in (layer.qkv, layer.out, layer.gate_up, layer.down)),
                    layer.input_norm.data_ptr(),
                    layer.post_norm.data_ptr(),
                )
                for layer in layers
            )
        )
        self._struct = DecoderStruct(
            ctypes.addressof(self._layers), final_norm.data_ptr(), len(layers), len(final_norm), layers[0].down.inputs,
            num_heads, num_kv_heads, head_dim, num_rotated, epsilon, head_dim**-0.5,
        )  # fmt: skip

    def forward(self, hidden: Tensor, rotations: Tensor, attention: NativeAttention) -> None:
        """In place. hidden: [rows, hidden_size] float32; rotations: [rows, num_rotated] float32, (cos, sin) of each
        pair of channels."""
        scales = (None, None) if attention.scales is None else tuple(scale.data_ptr() for scale in attention.scales)
        keys = attention.keys
        memory = MemoryStruct(
            keys.data_ptr(),
            attention.values.data_ptr(),
            *scales,
            keys.stride(0) * keys.element_size(),
            0 if attention.scales is None else attention.scales[0].stride(0),
        )
        decoder, step = ctypes.byref(self._struct), ctypes.byref(attention.struct)
        space, start = workspace(self._library.decoder_workspace(decoder, step))
        self._library.decoder_forward(
            decoder, step, ctypes.byref(memory), hidden.data_ptr(), rotations.data_ptr(), start
        )
        del space
