"""A stored model -> a running model on vLLM, which loads the transformers folder; the family gives the chat format."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from serving.engine.interface import EngineLimits, NetworkShape
from serving.generation.interface import ChatFormat
from serving.generation.pipeline import RunningModel
from serving.settings import Settings

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


class CannotStart(Exception):
    """vLLM cannot serve this model; the message is one line for the operator."""


def start_on_vllm(
    open_format: Callable[[Path], ChatFormat],
    folder: Path,
    metadata: Mapping[str, Any],
    settings: Settings,
    logger: logging.Logger,
    worker: int = 0,
    name: str = "model",
) -> RunningModel:
    """Start vLLM's engine over the stored weights. Raises CannotStart.

    worker: which of `settings.workers` this is, counted from 0; it gets `settings.gpus_per_worker` GPUs of its own.
    """
    started = time.monotonic()
    options = _vllm_options(settings)
    take_devices(worker, settings)
    try:
        from serving.engine.vllm.engine import VllmEngine, engine_arguments
        from serving.engine.vllm.token_masks import mask_maker
    except ImportError as error:
        raise CannotStart(f"CHATGLM_ENGINE=vllm needs requirements-vllm.txt installed: {error}") from None
    if metadata.get("prefix_tokens"):
        raise CannotStart("the model has a P-Tuning v2 prefix, which vLLM cannot begin with: use CHATGLM_ENGINE=native")
    chat_format = open_format(folder)
    limits = EngineLimits(settings.max_sequences, settings.max_batch_tokens)
    config = cast("dict[str, Any]", json.loads((folder / "config.json").read_text(encoding="utf-8")))
    context_length = int(metadata["context_length"])
    context_length = min(context_length, settings.context_length or context_length)
    try:
        arguments = engine_arguments(
            str(folder), limits, chat_format.num_tokens, context_length, options, mask_maker(chat_format)
        )
        engine = VllmEngine(arguments, limits, _shape(config, chat_format.num_tokens, context_length))
    except (TypeError, ValueError) as error:
        raise CannotStart(f"vLLM refuses: {str(error).splitlines()[0]}") from error
    logger.info(
        "%s on vLLM: context %d tokens, cache %d tokens; loaded in %.1f s",
        metadata["family"],
        engine.max_model_len,
        engine.limits.kv_tokens,
        time.monotonic() - started,
    )
    length = min(engine.max_model_len, engine.limits.kv_tokens)
    model = RunningModel(engine, chat_format, length, settings.drop_oldest_rounds, name)
    model.grammars.build_vocabulary()  # before the first request
    return model


def _vllm_options(settings: Settings) -> dict[str, Any]:
    """Our settings as vLLM's arguments."""
    options: dict[str, Any] = {"dtype": settings.precision, "tensor_parallel_size": settings.gpus_per_worker}
    if "max_batch_tokens" in settings.model_fields_set:  # else vLLM's own default, which depends on the GPU
        options["max_num_batched_tokens"] = settings.max_batch_tokens
    if settings.kv_cache_gib:
        options["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * 2**30)
    return options | settings.vllm_arguments


def take_devices(worker: int, settings: Settings) -> None:
    """Make only this worker's GPUs visible to vLLM's processes. BentoML makes all visible to all workers."""
    visible = [name for name in os.environ.get(VISIBLE_DEVICES, "").split(",") if name]
    first, count = worker * settings.gpus_per_worker, settings.gpus_per_worker
    if settings.workers == 1 or not visible:
        return
    if first + count > len(visible):
        raise CannotStart(f"worker {worker + 1} needs {count} GPUs of its own, and only {len(visible)} are visible")
    os.environ[VISIBLE_DEVICES] = ",".join(visible[first : first + count])


def _shape(config: Mapping[str, Any], num_tokens: int, context_length: int) -> NetworkShape:
    heads = int(config["num_attention_heads"])
    return NetworkShape(
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        hidden_size=int(config["hidden_size"]),
        vocab_size=int(config["vocab_size"]),
        num_tokens=min(num_tokens, int(config["vocab_size"])),
        max_positions=context_length,
    )
