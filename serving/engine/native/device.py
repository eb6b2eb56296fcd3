"""Device, memory and cores -> where to run, in which precision, with how much KV cache; copies to the device."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from serving.engine.interface import NetworkShape
from serving.engine.native.kv_memory import KVMemory

GIB = 2**30
SMALL_MODEL_BYTES = GIB // 4  # below this, full precision costs nothing
CPU_CACHE_SHARE = 0.25  # of the memory that is free after loading; the rest stays for activations and others
CPU_CACHE_LIMIT = 8 * GIB
GPU_CACHE_SHARE = 0.9  # or what leaves GPU_RESERVE, but no less than half
GPU_RESERVE = 5 * GIB // 4  # a step of 2,048 rows, CUDA graphs
WEIGHTS_MARGIN = 1.1  # beside the weights there must be some cache and the tensors of a step
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
MAX_KEPT_BLOCK = 32 * 2**20  # the most that glibc allows
MAX_KEPT = 512 * 2**20


def choose_device(setting: str, worker: int = 0) -> torch.device:
    """`auto` takes the fastest there is; of several GPUs, each worker takes its own (worker: counted from 0).

    Raises ValueError with one clear line if the wanted device is missing.
    """
    if setting == "auto":
        if torch.cuda.is_available():
            return _gpu_of(worker)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(setting)
    except RuntimeError:
        raise ValueError(f"{setting!r} is not a device; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and device.index is None:
        return _gpu_of(worker)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no CUDA device {device.index or 0} here ({torch.cuda.device_count()} found)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("there is no MPS device here")
    return device


def _gpu_of(worker: int) -> torch.device:
    count = torch.cuda.device_count()
    if worker >= count:
        raise ValueError(f"worker {worker + 1} has no GPU: there are {count}, and each worker needs one of its own")
    return torch.device("cuda", worker)


def choose_precision(
    device: torch.device, num_parameters: int, free_bytes: int
) -> Literal["float32", "bfloat16", "float16", "int8", "int4"]:
    """What `auto` means: 16 bits, in the type that the device computes fastest; full precision for small models; fewer
    bits where weights of 16 do not fit into `free_bytes` of the device."""
    bytes_per_parameter = free_bytes / WEIGHTS_MARGIN / max(num_parameters, 1)
    if device.type != "mps" and bytes_per_parameter < 2:
        return "int8" if bytes_per_parameter >= 1.1 else "int4"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "mps":
        return "float16"
    if num_parameters * 4 <= SMALL_MODEL_BYTES:
        return "float32"
    return "bfloat16"


def num_usable_cores() -> int:
    """Cores this process may use: its CPU affinity, cut by the container's CPU limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")
    if limit.is_file():
        quota, _, period = limit.read_text().strip().partition(" ")
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period or 100_000)))
    return cores


def keep_freed_memory() -> None:
    """Let the C library keep memory that steps free. Linux with glibc only; no effect elsewhere.

    By default it returns every large block to the system at once, and each temporary tensor of a step costs page
    faults: a quarter of the time of a prompt's rows.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, MAX_KEPT_BLOCK)
    mallopt(M_TRIM_THRESHOLD, MAX_KEPT)


def release_memory() -> None:
    """Give memory that unloaded models have freed back to the system and to other processes on the GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # not glibc


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device, within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _meminfo_available()
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return 8 * GIB


def kv_dtype(device: torch.device, precision: str, dtype: torch.dtype, kv_precision: str = "auto") -> torch.dtype:
    """The type of stored keys and values. `auto`: 16 bits with weights of 16 bits or less, though a CPU computes in
    float32; with float32 and float16 weights, the type that they compute in."""
    if kv_precision == "8":
        return torch.int8
    if kv_precision == "16" and dtype == torch.float32:
        return torch.bfloat16
    if device.type == "cpu" and precision in ("bfloat16", "int8", "int4"):
        return torch.bfloat16
    return dtype


def cache_tokens(shape: NetworkShape, device: torch.device, dtype: torch.dtype, gib: float, max_sequences: int) -> int:
    """Tokens the KV cache will hold. `gib` 0 takes a share of what is free now, after the weights were loaded; never
    more than max_sequences full contexts, and less than one if the budget is too small."""
    per_token = KVMemory.bytes_per_token(shape, dtype)
    budget = int(gib * GIB)
    if not budget:
        free = free_memory(device)
        if device.type == "cuda":
            budget = max(free // 2, min(int(free * GPU_CACHE_SHARE), free - GPU_RESERVE))
        else:
            budget = min(int(free * CPU_CACHE_SHARE), CPU_CACHE_LIMIT)
    return min(budget // per_token, max_sequences * shape.max_positions)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that the device or the host has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor in stream order. Plain `.to` would first wait for everything that a GPU has to do.

    The copy is made from pinned memory, which torch keeps until the copy is done.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def numbers_to_device(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """[numbers] on `device`."""
    return to_device(torch.tensor(numbers, dtype=dtype), device)
