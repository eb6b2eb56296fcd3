"""Brings a stored model up: device, precision, weights, cache, engine. Knows no family; it is handed the loader."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from serving.engine.interface import CausalLM, EngineLimits
from serving.engine.native.attention import KVMemory
from serving.engine.native.cuda_graphs import CudaRecorder
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
from serving.generation.interface import ChatFormat
from serving.generation.pipeline import RunningModel
from serving.settings import Settings

PROGRESS_SECONDS = 5.0
# oneDNN keeps a compiled kernel for each number of rows that it meets: 1,024 of them, 0.2 MiB each, if not told less
KERNELS, NUM_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256"


class LoadedNetwork(Protocol):
    """What a family's loader returns."""

    @property
    def network(self) -> CausalLM: ...
    @property
    def chat_format(self) -> ChatFormat: ...


class Progress(Protocol):
    """Told how far loading is."""

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

    worker: which of `settings.workers` this is, counted from 0; GPUs and cores are shared out by it.
    """
    started = time.monotonic()
    device = choose_device(settings.device, worker)
    if device.type == "cpu":
        os.environ.setdefault(KERNELS, NUM_KERNELS)  # read at the first operation
        torch.set_num_threads(settings.threads or max(1, num_usable_cores() // settings.workers))
    num_parameters = int(metadata["parameters"])
    automatic = metadata.get("quantized") or choose_precision(device, num_parameters, free_memory(device))
    precision = automatic if settings.precision == "auto" else settings.precision
    loaded = load(folder, metadata, device, precision, _Progress(logger))
    if device.type == "cpu":
        keep_freed_memory()  # not before: what loading gives back had better go
    shape, dtype = loaded.network.shape, kv_dtype(device, precision, loaded.network.dtype)
    kv_tokens = cache_tokens(shape, device, dtype, settings.kv_cache_gib, settings.max_sequences)
    context_length = min(shape.max_positions, kv_tokens)
    engine = NativeEngine(
        loaded.network,
        EngineLimits(
            max_sequences=settings.max_sequences,
            max_batch_tokens=max(settings.max_batch_tokens, settings.max_sequences + 1),
            kv_tokens=kv_tokens,
            kv_dtype=dtype,
        ),
        record=CudaRecorder(device) if device.type == "cuda" and not settings.quick_start else None,
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


class _Progress:
    """Says in the log how far loading is, every few seconds, and how long the step that it is at will still take."""

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
