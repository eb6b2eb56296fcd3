"""The BentoML model store, by the names that BentoML does not publish: its folder, and a store in another folder.

tests/unit/test_store_adapter.py fails when BentoML changes one of them. bentoml is imported inside the functions: it is
slow, and a refused import should not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bentoml import Tag


def store_folder() -> Path:
    """The folder that `bentoml.models` reads: NAME/VERSION is a model, NAME/latest names the latest version."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    return Path(BentoMLContainer.model_store_dir.get())


def create_model_in(folder: Path, tag: Tag, labels: Mapping[str, str], metadata: Mapping[str, Any]) -> Path:
    """Let BentoML write a model without weights into a store of its own in `folder`; return the model's folder."""
    import bentoml
    from bentoml._internal.models import ModelStore

    folder.mkdir()
    store = ModelStore(folder)
    with bentoml.models.create(tag, labels=dict(labels), metadata=dict(metadata), _model_store=store):
        pass  # model.yaml is all that BentoML has to write
    return Path(store.get(tag).path)


@contextmanager
def using_store(folder: Path) -> Iterator[None]:
    """Within the block this process uses the model store in `folder`. For tests."""
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.models import ModelStore

    BentoMLContainer.model_store_dir.set(str(folder))
    BentoMLContainer.model_store.set(ModelStore(folder))
    try:
        yield
    finally:
        BentoMLContainer.model_store.reset()
        BentoMLContainer.model_store_dir.reset()
