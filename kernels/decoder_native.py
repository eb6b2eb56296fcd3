"""The packed layers of a GLM or Llama decoder -> hidden states, all layers in one call of the compiled kernels.

See kernels/native/decoder.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.attention_native import NativeAttention, functions, workspace
from kernels.layouts import PackedLinear
from kernels.linears_native import LinearStruct, linear_struct


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
