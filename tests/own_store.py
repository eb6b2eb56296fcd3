"""A Bento model store for one test, in this process, and the way from a checkpoint folder to a running model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from models.store.bentoml_adapter import using_store
from models.store.model_store import import_model, servable
from models.store.progress import no_progress
from serving.generation.pipeline import RunningModel
from serving.settings import Settings
from serving.worker.start_native import start_model
from tests.sources import source_of

SETTINGS = Settings(device="cpu", precision="float32", threads=1, kv_cache_gib=0.01)


@contextmanager
def own_store(home: Path) -> Iterator[None]:
    """Within the block `models.store` works in `home`."""
    folder = home / "models"
    folder.mkdir(parents=True, exist_ok=True)
    with using_store(folder):
        yield


def imported_and_started(
    home: Path, family: str, source: Path, options: Mapping[str, str], settings: Settings = SETTINGS
) -> RunningModel:
    """What `python -m models.store import` and then `service.py` do; the caller stops its engine."""
    with own_store(home):
        tag = import_model(family, source, f"tiny-{family}:1", options, no_progress)
        stored = servable(tag)
        assert (stored.family, stored.path.is_relative_to(home)) == (family, True)
        model = start_model(source_of(stored, settings), settings, logging.getLogger("tests")).running
        assert isinstance(model, RunningModel)
        return model
