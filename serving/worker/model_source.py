"""Settings and stored models -> the registry of what is served, before anything is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.registry import GENERATES, Ability, ModelRegistry, Running, ServedModel
from serving.settings import ModelSettings, Settings


@dataclass(frozen=True)
class ModelSource:
    """Where a served model comes from."""

    tag: str
    path: Path
    family: str
    metadata: Mapping[str, Any]
    abilities: frozenset[Ability]
    load: Callable[..., Any]  # see models.family.Family
    open_format: Callable[[Path], Any] | None
    settings: Settings  # with those that this model has of its own


@dataclass(frozen=True)
class StartedModel:
    """A model that runs, and what it takes."""

    running: Running
    precision: str
    num_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes for all models together, for the KV cache of each that has no setting of its own, and of each model."""

    total: int
    kv_cache: int
    of_model: Mapping[str, int]  # by name


def build_registry(
    chosen: Sequence[ModelSettings], sources: Mapping[str, ModelSource], accept_any: bool
) -> ModelRegistry:
    """The models of the settings under their names, none of them loaded."""
    created = int(time.time())
    return ModelRegistry(
        [
            ServedModel(
                name=each.served_name,
                aliases=each.aliases,
                created=created,
                fingerprint=f"fp_{source.tag.partition(':')[2][:12]}",
                family=source.family,
                abilities=source.abilities if source.settings.engine == "native" else GENERATES - {"embeddings"},
                is_preloaded=bool(each.preload),
                precision=source.settings.precision,
            )
            for each in chosen
            for source in [sources[each.served_name]]
        ],
        accept_any=accept_any,
    )
