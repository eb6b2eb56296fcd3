"""The names that BentoML does not publish are still there and do what models/store/bentoml_adapter.py needs."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import bentoml
import pytest

from models.store.bentoml_adapter import create_model_in, store_folder, using_store

CONTAINERS = "bentoml._internal.configuration.containers"
ADVICE = "change models/store/bentoml_adapter.py"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (CONTAINERS, "BentoMLContainer.model_store_dir.get"),
        (CONTAINERS, "BentoMLContainer.model_store_dir.set"),
        (CONTAINERS, "BentoMLContainer.model_store_dir.reset"),
        (CONTAINERS, "BentoMLContainer.model_store.set"),
        (CONTAINERS, "BentoMLContainer.model_store.reset"),
        ("bentoml._internal.models", "ModelStore.get"),
    ],
)
def test_every_private_name_exists(module: str, name: str) -> None:
    try:
        value: object = importlib.import_module(module)
        for attribute in name.split("."):
            value = getattr(value, attribute)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"BentoML {bentoml.__version__} has no {module}.{name} any more ({error}): {ADVICE}")


def test_a_model_can_be_created_in_another_store() -> None:
    parameters = inspect.signature(bentoml.models.create).parameters
    assert "_model_store" in parameters, (
        f"bentoml.models.create of BentoML {bentoml.__version__} has no argument _model_store any more: {ADVICE}"
    )


def test_the_store_folder_is_the_one_that_bentoml_reads(tmp_path: Path) -> None:
    with using_store(tmp_path):
        assert store_folder() == tmp_path
        with bentoml.models.create("probe:v1"):
            pass
        assert (tmp_path / "probe" / "v1" / "model.yaml").is_file(), f"BentoML writes models elsewhere: {ADVICE}"
        assert (tmp_path / "probe" / "latest").read_text() == "v1", (
            f"BentoML names the latest version elsewhere: {ADVICE}"
        )
    assert store_folder() != tmp_path


def test_a_model_that_was_created_elsewhere_and_moved_is_found(tmp_path: Path) -> None:
    tag = bentoml.Tag("probe", "v2")
    (tmp_path / "store").mkdir()
    with using_store(tmp_path / "store"):
        folder = create_model_in(tmp_path / "staging", tag, {"family": "x"}, {"family": "x", "size": 1})
        assert folder.is_relative_to(tmp_path / "staging"), f"BentoML ignores _model_store: {ADVICE}"
        assert not bentoml.models.list()
        (tmp_path / "store" / "probe").mkdir()
        folder.rename(tmp_path / "store" / "probe" / "v2")
        found = bentoml.models.get("probe:v2")
        assert (found.info.metadata["size"], found.info.labels) == (1, {"family": "x"})
