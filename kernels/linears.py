"""nn.Linear layers -> the fastest equivalent for a device and a precision, packed once while a model loads.

`linears_cpu` and `linears_cuda` list the variants of each precision. A variant is tried on a small product before it is
used; the first that exists on this machine and gives the right numbers is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from kernels import linears_cpu, linears_cuda, native_library
from kernels.layouts import GROUP
from kernels.linears_native import StoredEmbedding
from kernels.precision import Precision, Progress, QuantizedPrecision, UnsupportedPrecision
from kernels.quantization import QuantizedLinear

logger = logging.getLogger(__name__)
CPU = torch.device("cpu")
QUANTIZED = ("int8", "int4")
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3, "int8": 5e-2, "int4": 0.2}  # relative, of the product
Variant = Callable[[Any, torch.dtype], nn.Module]  # (nn.Linear or QuantizedLinear on the device, activations' type)


@dataclass(frozen=True)
class DeviceKernels:
    """The linear layers of one kind of device."""

    variants: Mapping[Precision, tuple[Variant, ...]]  # the fastest first
    max_packed_at_once: int  # layers; they are held twice while they are packed


DEVICES = {
    "cpu": DeviceKernels(linears_cpu.VARIANTS, 4),
    "cuda": DeviceKernels(linears_cuda.VARIANTS, 1),
}


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of activations."""
    if device.type == "cpu":
        is_bfloat16 = precision == "bfloat16" and not has_native_kernels() and has_bfloat16_kernels()
        return torch.bfloat16 if is_bfloat16 else torch.float32
    if precision in QUANTIZED:
        return linears_cuda.compute_dtype(device)
    return torch.float16 if precision == "float16" else torch.float32 if precision == "float32" else torch.bfloat16


def storage_dtype(precision: Precision, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The type to read weights as before they are packed, no wider than needed. `stored`: their type on disk."""
    if precision == "float32":
        return torch.float32
    if device.type != "cpu":
        return compute_dtype(precision, device)
    if precision == "bfloat16" and (has_native_kernels() or has_bfloat16_kernels()):
        return torch.bfloat16
    if precision == "float16":
        return torch.float16
    return stored if stored.itemsize == 2 else torch.float16


def load_device(precision: Precision, device: torch.device) -> torch.device:
    """Where weights are read to before they are packed: GPU memory may hold them only once they are quantised."""
    return CPU if device.type == "cuda" and precision in QUANTIZED else device


@torch.inference_mode()
def pack(model: nn.Module, precision: Precision, device: torch.device, progress: Progress) -> None:
    """Replace every linear layer of `model` and bring it to `device`, a few layers at a time.

    On a CPU a layer is packed by one thread, so several are packed at once; embeddings keep their stored type, and
    other parameters get the type of activations. On a GPU in 16 or 32 bits there is nothing to do.
    Raises UnsupportedPrecision.
    """
    if device.type != "cpu" and precision not in QUANTIZED:
        return
    if device.type not in DEVICES:
        raise UnsupportedPrecision(f"{precision} weights are for CPUs and CUDA; on {device.type} use float16")
    replaced = (nn.Linear, QuantizedLinear, *((nn.Embedding,) if device.type == "cpu" else ()))
    layers: list[tuple[nn.Module, str, nn.Module]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, replaced)
    ]
    total, done = sum(_num_bytes(layer) for _, _, layer in layers), 0
    at_once = DEVICES[device.type].max_packed_at_once
    with ThreadPoolExecutor(min(torch.get_num_threads(), at_once)) as pool:
        run = pool.map if at_once > 1 else map
        while layers:
            batch, layers = layers[:at_once], layers[at_once:]
            packed = list(run(lambda entry: _packed_layer(entry[1], entry[2], precision, device), batch))
            for (parent, name, layer), replacement in zip(batch, packed, strict=True):
                done += _num_bytes(layer)
                setattr(parent, name, replacement)
            progress(done, total, f"packing {precision}")
    if device.type != "cpu":
        model.to(device)
        return
    for parameter in model.parameters():
        parameter.data = parameter.data.to(compute_dtype(precision, device))


def _num_bytes(layer: nn.Module) -> int:
    if isinstance(layer, QuantizedLinear):
        return layer.num_bytes
    return cast("nn.Linear | nn.Embedding", layer).weight.nbytes


@torch.inference_mode()
def _packed_layer(name: str, layer: nn.Module, precision: Precision, device: torch.device) -> nn.Module:
    if isinstance(layer, nn.Embedding):
        return StoredEmbedding(layer, compute_dtype(precision, device))
    linear = cast("nn.Linear | QuantizedLinear", layer)
    # the output layer decides between tokens: it stays in eight bits
    if precision == "int4" and name == "lm_head":
        precision = "int8"
        if isinstance(linear, QuantizedLinear) and linear.precision == "int4":
            linear = linear.dequantized()
    return packed_linear(linear, precision, device)


def packed_linear(linear: nn.Linear | QuantizedLinear, precision: Precision, device: torch.device) -> nn.Module:
    """One layer in its fastest form. A quantised layer keeps its own precision. Raises UnsupportedPrecision."""
    dtype = compute_dtype(precision, device)
    if device.type == "cpu" and precision == "bfloat16" and not (has_native_kernels() or has_bfloat16_kernels()):
        precision = "float16"
    if precision == "int8" or precision == "int4":
        linear = _quantized(linear, precision, device)
        precision = linear.precision
    for variant in DEVICES[device.type].variants[precision]:
        if is_accurate(variant, precision, device, dtype):
            return variant(linear, dtype)
    raise UnsupportedPrecision(f"{precision} weights do not work on {device}; use float16 or bfloat16")


def _quantized(
    linear: nn.Linear | QuantizedLinear, precision: QuantizedPrecision, device: torch.device
) -> QuantizedLinear:
    """On `device`; a layer that is quantised already keeps its values."""
    if isinstance(linear, QuantizedLinear):
        return linear.moved(device)
    return QuantizedLinear.from_linear(linear, precision, device)


@cache
@torch.inference_mode()
def is_accurate(variant: Variant, precision: Precision, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a variant exists on this device and gives the right products of any number of rows."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(4 * GROUP, 96, bias=True)
    linear.weight.copy_(torch.randn(96, 4 * GROUP, generator=generator))
    x = torch.randn(80, 4 * GROUP, generator=generator)
    expected = linear(x)
    try:
        layer: nn.Module = linear
        if precision == "int8" or precision == "int4":
            layer = _quantized(linear, precision, device)
        packed = variant(layer, dtype)
        products = [packed(x[:rows].to(device, dtype)).float().cpu() for rows in (1, 3, 40, 80)]
    except Exception as error:  # noqa: BLE001
        # an operator that this build of torch or this device does not have; Triton documents no exception types
        if device.type != "cpu" and variant is DEVICES[device.type].variants[precision][0]:
            reason = str(error).partition("\n")[0]
            logger.warning("%s has no %s kernel (%s): weights are dequantised at each use", device, precision, reason)
        return False
    tolerance = TOLERANCE[precision]
    return all(bool((y - expected[: len(y)]).norm() <= tolerance * expected[: len(y)].norm()) for y in products)


@cache
def has_native_kernels() -> bool:
    """Whether the compiled kernels can be loaded, and multiply rightly."""
    return native_library.load() is not None and is_accurate(
        linears_cpu.VARIANTS["bfloat16"][0], "bfloat16", CPU, torch.float32
    )


@cache
def has_bfloat16_kernels() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware, and oneDNN packs them."""
    found = torch.cpu.get_capabilities()
    is_in_hardware = bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
    return is_in_hardware and is_accurate(linears_cpu.OneDnnLinear, "bfloat16", CPU, torch.bfloat16)
