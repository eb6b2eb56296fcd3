"""Stored model -> a running native engine: chooses device, precision and cache size, loads the weights, warms up."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from serving.engine.interface import CausalLM, EngineLimits, TrainedPrefix
from serving.engine.native.cuda_graphs import CudaCapture
from serving.engine.native.device import (
    GIB,
    cache_tokens,
    choose_device,
    choose_precision,
    free_memory,
    keep_freed_memory,
    kv_dtype,
    num_usable_cores,
)
from serving.engine.native.engine import NativeEngine
from serving.engine.native.kv_memory import KVMemory
from serving.generation.interface import ChatFormat
from serving.generation.pipeline import RunningModel
from serving.settings import Settings

PROGRESS_SECONDS = 5.0
# oneDNN caches a compiled kernel of 0.2 MiB for each number of rows, 1,024 of them by default
ONEDNN_KERNELS, NUM_ONEDNN_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256"
GPU_BATCH_TOKENS = 2048


class LoadedNetwork(Protocol):
    """What a family's loader returns."""

    @property
    def network(self) -> CausalLM: ...
    @property
    def chat_format(self) -> ChatFormat: ...
    @property
    def prefix(self) -> TrainedPrefix | None: ...


class Progress(Protocol):
    """Called while a model loads; `what` names the present step."""

    def __call__(self, done_bytes: int, total_bytes: int, what: str) -> None: ...


Loader = Callable[[Path, Mapping[str, Any], torch.device, Any, Progress], LoadedNetwork]


def start_model(
    load: Loader,
    folder: Path,
    metadata: Mapping[str, Any],
    settings: Settings,
    logger: logging.Logger,
    worker: int = 0,
) -> RunningModel:
    """Load the weights and start the engine; logs the facts of the running model in one line.

    worker: which of `settings.workers` this is, counted from 0; each takes its own GPU and its share of the cores.
    """
    started = time.monotonic()
    device = choose_device(settings.device, worker)
    if device.type == "cpu":
        os.environ.setdefault(ONEDNN_KERNELS, NUM_ONEDNN_KERNELS)  # read at oneDNN's first operation
        torch.set_num_threads(settings.threads or max(1, num_usable_cores() // settings.workers))
    num_parameters = int(metadata["parameters"])
    automatic = metadata.get("quantized") or choose_precision(device, num_parameters, free_memory(device))
    precision = automatic if settings.precision == "auto" else settings.precision
    loaded = load(folder, metadata, device, precision, _ProgressLog(logger))
    if device.type == "cpu":
        keep_freed_memory()  # only now: memory that loading has freed should go back to the system
    shape, dtype = loaded.network.shape, kv_dtype(device, precision, loaded.network.dtype, settings.kv_precision)
    kv_tokens = cache_tokens(shape, device, dtype, settings.kv_cache_gib, settings.max_sequences)
    context_length = min(shape.max_positions, kv_tokens - (loaded.prefix.num_tokens if loaded.prefix else 0))
    engine = NativeEngine(
        loaded.network,
        EngineLimits(
            max_sequences=settings.max_sequences,
            max_batch_tokens=max(_batch_tokens(settings, device), settings.max_sequences + 1),
            kv_tokens=kv_tokens,
            kv_dtype=dtype,
        ),
        capture=CudaCapture(device) if device.type == "cuda" and not settings.quick_start else None,
        prefix=loaded.prefix,
    )
    engine.start()
    logger.info(
        "%s: %s parameters in %s on %s (%d threads); %d layers, vocabulary %d, context %d tokens, "
        "cache %d tokens (%.2f GiB); loaded in %.1f s",
        metadata["family"],
        f"{num_parameters:,}",
        precision,
        device if device.type == "cpu" else f"{device} {torch.cuda.get_device_name(device)}",
        torch.get_num_threads(),
        shape.num_layers,
        shape.num_tokens,
        context_length,
        kv_tokens,
        kv_tokens * KVMemory.bytes_per_token(shape, dtype) / GIB,
        time.monotonic() - started,
    )
    model = RunningModel(engine, loaded.chat_format, context_length, settings.drop_oldest_rounds)
    model.grammars.build_vocabulary()  # before the first request
    return model


def _batch_tokens(settings: Settings, device: torch.device) -> int:
    """A step on a GPU takes the same time for 100 rows as for 1,000: by default it has more of them there."""
    is_chosen = "max_batch_tokens" in settings.model_fields_set or device.type != "cuda"
    return settings.max_batch_tokens if is_chosen else GPU_BATCH_TOKENS


class _ProgressLog:
    """Logs every few seconds how much of the present step of loading is done, and its remaining time."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._what = ""
        self._begun = self._last = time.monotonic()

    def __call__(self, done_bytes: int, total_bytes: int, what: str) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._begun = what, now
        if now - self._last >= PROGRESS_SECONDS and done_bytes:
            self._last = now
            left = int((now - self._begun) * (total_bytes - done_bytes) / done_bytes)
            done, total = done_bytes / GIB, total_bytes / GIB
            self._logger.info("%s: %.1f of %.1f GiB, %d:%02d left", what, done, total, left // 60, left % 60)
