"""A Bento model store of a test's own, in this process, and the way from a checkpoint folder to a served model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bentoml._internal.configuration.containers import BentoMLContainer  # the public way is BENTOML_HOME, at import
from bentoml._internal.models import ModelStore

from models.families import FAMILIES
from models.store.model_store import import_model, servable
from models.store.progress import no_progress
from serving.generation.pipeline import RunningModel
from serving.settings import Settings
from serving.worker.start_native import start_model

SETTINGS = Settings(device="cpu", precision="float32", threads=1, kv_cache_gib=0.01)


@contextmanager
def own_store(home: Path) -> Iterator[None]:
    """`models.store` works in `home` for as long as the block lasts."""
    folder = home / "models"
    folder.mkdir(parents=True, exist_ok=True)
    BentoMLContainer.model_store_dir.set(str(folder))
    BentoMLContainer.model_store.set(ModelStore(folder))
    try:
        yield
    finally:
        BentoMLContainer.model_store.reset()
        BentoMLContainer.model_store_dir.reset()


def imported_and_started(
    home: Path, family: str, source: Path, options: Mapping[str, str], settings: Settings = SETTINGS
) -> RunningModel:
    """What `python -m models.store import` and then `service.py` do; stop its engine."""
    with own_store(home):
        tag = import_model(family, source, f"tiny-{family}:1", options, no_progress)
        stored = servable(tag)
        assert (stored.family, stored.path.is_relative_to(home)) == (family, True)
        load = FAMILIES[stored.family].load
        return start_model(load, stored.path, stored.metadata, settings, logging.getLogger("tests"))
