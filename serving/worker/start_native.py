"""Stored model -> a running native engine: chooses device, precision and cache size, loads the weights, warms up."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from serving.engine.encoder_engine import EncoderEngine
from serving.engine.interface import EngineLimits
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
from serving.generation.encoder import RunningEncoder
from serving.generation.pipeline import RunningModel
from serving.settings import Settings
from serving.worker.model_source import MemoryPlan, ModelSource, StartedModel

PROGRESS_SECONDS = 5.0
# oneDNN caches a compiled kernel of 0.2 MiB for each number of rows, 1,024 of them by default
ONEDNN_KERNELS, NUM_ONEDNN_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256"
GPU_BATCH_TOKENS = 2048
ENCODER_BATCH_TOKENS = 4096
BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1.13, "int4": 0.63}
OVERHEAD = 64 * 2**20  # of a loaded model beside weights and cache: tokenizer, grammars, the tensors of a step
MODELS_SHARE = 0.8  # of the free memory, for several models
KV_SHARE = 0.25  # of the models' memory, for the caches of all that have no setting of their own


def start_model(
    source: ModelSource,
    settings: Settings,
    logger: logging.Logger,
    worker: int = 0,
    name: str = "model",
    turns: AbstractContextManager[None] | None = None,
    report: Callable[[float], None] = lambda done: None,
) -> StartedModel:
    """Load the weights and start the engine; logs the facts of the running model in one line.

    worker: which of `settings.workers` this is, counted from 0; each takes its own GPU and its share of the cores.
    turns: where several engines share the device. report: called with how much is done, 0 to 1.
    """
    started, metadata = time.monotonic(), source.metadata
    device = _prepared_device(settings, worker)
    num_parameters = int(metadata["parameters"])
    precision = _precision(source, settings, device)
    loaded = source.load(source.path, metadata, device, precision, _ProgressLog(logger, report))
    if device.type == "cpu":
        keep_freed_memory()  # only now: memory that loading has freed should go back to the system
    shape, dtype = loaded.network.shape, kv_dtype(device, precision, loaded.network.dtype, settings.kv_precision)
    kv_tokens = cache_tokens(shape, device, dtype, settings.kv_cache_gib, settings.max_sequences)
    context_length = min(shape.max_positions, kv_tokens - (loaded.prefix.num_tokens if loaded.prefix else 0))
    if settings.context_length:
        context_length = min(context_length, settings.context_length)
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
        turns=turns,
    )
    engine.start()
    kv_bytes = kv_tokens * KVMemory.bytes_per_token(shape, dtype)
    logger.info(
        "%s: %s parameters in %s on %s (%d threads); %d layers, vocabulary %d, context %d tokens, "
        "cache %d tokens (%.2f GiB); loaded in %.1f s",
        source.family,
        f"{num_parameters:,}",
        precision,
        device if device.type == "cpu" else f"{device} {torch.cuda.get_device_name(device)}",
        torch.get_num_threads(),
        shape.num_layers,
        shape.num_tokens,
        context_length,
        kv_tokens,
        kv_bytes / GIB,
        time.monotonic() - started,
    )
    model = RunningModel(engine, loaded.chat_format, context_length, settings.drop_oldest_rounds, name)
    model.grammars.build_vocabulary()  # before the first request
    return StartedModel(model, precision, _weight_bytes(num_parameters, precision) + kv_bytes + OVERHEAD)


def start_encoder(
    source: ModelSource,
    settings: Settings,
    logger: logging.Logger,
    worker: int = 0,
    name: str = "model",
    turns: AbstractContextManager[None] | None = None,
    report: Callable[[float], None] = lambda done: None,
) -> StartedModel:
    """The same for an embedding model or a cross-encoder."""
    started = time.monotonic()
    device = _prepared_device(settings, worker)
    num_parameters = int(source.metadata["parameters"])
    precision = _precision(source, settings, device)
    loaded = source.load(source.path, source.metadata, device, precision, _ProgressLog(logger, report))
    context_length = min(loaded.network.max_positions, settings.context_length or loaded.network.max_positions)
    num_tokens = max(ENCODER_BATCH_TOKENS, context_length)
    limits = EngineLimits(settings.max_sequences, num_tokens, settings.max_sequences * context_length)
    engine = EncoderEngine(loaded.network, limits, turns)
    engine.start()
    logger.info(
        "%s: %s parameters in %s on %s (%d threads); %d numbers a vector, context %d tokens; loaded in %.1f s",
        source.tag,
        f"{num_parameters:,}",
        precision,
        device,
        torch.get_num_threads(),
        loaded.network.num_outputs,
        context_length,
        time.monotonic() - started,
    )
    model = RunningEncoder(
        engine, loaded.tokenizer, context_length, loaded.prompts, loaded.default_prompt, loaded.dimensions, name
    )
    return StartedModel(model, precision, _weight_bytes(num_parameters, precision) + OVERHEAD)


def plan_memory(sources: Mapping[str, ModelSource], settings: Settings, worker: int) -> MemoryPlan:
    """How several models share the device's memory."""
    device = choose_device(settings.device, worker)
    total = int(settings.memory_gib * GIB) or int(free_memory(device) * MODELS_SHARE)
    total //= settings.workers if device.type == "cpu" else 1
    num_generating = sum("chat" in source.abilities for source in sources.values())
    kv_cache = int(total * KV_SHARE / max(1, num_generating))
    needed: dict[str, int] = {}
    for name, source in sources.items():
        parameters = int(source.metadata["parameters"])
        needed[name] = _weight_bytes(parameters, _precision(source, source.settings, device, total)) + OVERHEAD
        if "chat" in source.abilities:
            needed[name] += int(source.settings.kv_cache_gib * GIB) or kv_cache
    return MemoryPlan(total, kv_cache, needed)


def _prepared_device(settings: Settings, worker: int) -> torch.device:
    device = choose_device(settings.device, worker)
    if device.type == "cpu":
        os.environ.setdefault(ONEDNN_KERNELS, NUM_ONEDNN_KERNELS)  # read at oneDNN's first operation
        torch.set_num_threads(settings.threads or max(1, num_usable_cores() // settings.workers))
    return device


def _precision(source: ModelSource, settings: Settings, device: torch.device, free_bytes: int | None = None) -> Any:
    """Encoders compute in float32 on a CPU and in 16 bits elsewhere: their linear layers are not quantised."""
    num_parameters = int(source.metadata["parameters"])
    wanted = settings.precision
    if "chat" not in source.abilities:
        automatic = "float32" if device.type == "cpu" else "float16"
        return automatic if wanted in ("auto", "int8", "int4") else wanted
    automatic = source.metadata.get("quantized") or choose_precision(
        device, num_parameters, free_memory(device) if free_bytes is None else free_bytes
    )
    return automatic if wanted == "auto" else wanted


def _weight_bytes(num_parameters: int, precision: str) -> int:
    return int(num_parameters * BYTES_PER_PARAMETER[precision])


def _batch_tokens(settings: Settings, device: torch.device) -> int:
    """A step on a GPU takes the same time for 100 rows as for 1,000: by default it has more of them there."""
    is_chosen = "max_batch_tokens" in settings.model_fields_set or device.type != "cuda"
    return settings.max_batch_tokens if is_chosen else GPU_BATCH_TOKENS


class _ProgressLog:
    """Logs every few seconds how much of the present step of loading is done, and its remaining time."""

    def __init__(self, logger: logging.Logger, report: Callable[[float], None]) -> None:
        self._logger, self._report = logger, report
        self._what = ""
        self._begun = self._last = time.monotonic()

    def __call__(self, done_bytes: int, total_bytes: int, what: str) -> None:
        now = time.monotonic()
        self._report(done_bytes / total_bytes if total_bytes else 0.0)
        if what != self._what:
            self._what, self._begun = what, now
        if now - self._last >= PROGRESS_SECONDS and done_bytes:
            self._last = now
            left = int((now - self._begun) * (total_bytes - done_bytes) / done_bytes)
            done, total = done_bytes / GIB, total_bytes / GIB
            self._logger.info("%s: %.1f of %.1f GiB, %d:%02d left", what, done, total, left // 60, left % 60)
