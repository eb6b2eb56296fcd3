"""Stored models as the server's loader takes them."""

from __future__ import annotations

from models.families import FAMILIES
from models.store.model_store import StoredModel
from serving.settings import Settings
from serving.worker.model_source import ModelSource


def source_of(stored: StoredModel, settings: Settings) -> ModelSource:
    family = FAMILIES[stored.family]
    return ModelSource(
        stored.tag,
        stored.path,
        stored.family,
        stored.metadata,
        family.abilities,
        family.load,
        family.open_format,
        settings,
    )
