"""Checkpoint folders -> models in the Bento model store, with their family, and tags -> stored models.

bentoml is imported inside the functions: it is slow, and a refused import should not wait for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.precision import Progress, QuantizedPrecision
from models.families import FAMILIES, AnyFamily
from models.family import ImportRefused
from models.store.bentoml_adapter import create_model_in, store_folder
from models.store.progress import no_progress
from models.store.staging import move_folder, staging_folder

if TYPE_CHECKING:
    from bentoml import Model, Tag

DEMO_NAME = "chatglm2-demo"
CONVERSION = "1"  # increase it when an import writes something else, so that the demo is imported anew


class StoreError(Exception):
    """The store cannot do this; the message is one line for the operator."""


class AlreadyStored(StoreError):
    """There is a model with this tag."""

    def __init__(self, tag: Tag) -> None:
        super().__init__(
            f"the model store has {tag} already: choose another version, or run `bentoml models delete {tag}`"
        )


@dataclass(frozen=True)
class StoredModel:
    """A model in the store that was imported by this program."""

    tag: str
    path: Path
    family: str
    metadata: Mapping[str, Any]


def import_model(
    family: str,
    source: Path,
    name: str | None,
    options: Mapping[str, str],
    progress: Progress,
    adapters: Sequence[str] = (),
    tokenizer: Path | None = None,
    origin: str | None = None,
) -> str:
    """Convert the checkpoint folder `source` into the store; return its tag. Raises ImportRefused, StoreError.

    name: `NAME` (with a new version) or `NAME:VERSION`; None takes the folder's name. A failed or interrupted import
    leaves nothing behind, and the next import removes what a killed one left.
    adapters: folders of LoRA adapters to merge, `DIR` or `DIR=WEIGHT`.
    tokenizer: where the tokenizer's files are taken from if `source` lacks them.
    origin: where `source` comes from, for the metadata; None takes its name.
    """
    from models.checkpoints import lora
    from models.checkpoints.inspection import inspect
    from models.checkpoints.prepared import prepared

    import_checkpoint = _family(family, options).import_checkpoint
    if not source.is_dir() and source.suffix != ".gguf":
        raise ImportRefused(f"{source} is not a folder")
    if not source.exists():
        raise ImportRefused(f"{source} does not exist")
    source = source.resolve()
    merging = [lora.parse(adapter) for adapter in adapters]
    if lora.is_adapter(source):
        raise ImportRefused(f"{source} is {inspect(source)}")

    def write(folder: Path) -> dict[str, Any]:
        ready = prepared(source, merging, tokenizer, folder.parent / "prepared", progress)
        metadata = import_checkpoint(ready, folder, options, progress)
        if merging:
            metadata["adapters"] = [each.path.resolve().name for each in merging]
        size = sum(path.stat().st_size for path in folder.rglob("*"))
        progress(size, size, "into the store")  # the last call that may raise to interrupt the import
        return metadata | {"family": family, "source": origin or source.name, "options": dict(options)}

    return _add(_new_tag(name or (source.name if source.is_dir() else source.stem)), write)


def quantize_model(tag: str, precision: QuantizedPrecision, name: str | None, progress: Progress) -> str:
    """Store a model again with weights of 8 or 4 bits, which load faster and need less space; return the new tag.

    name: as for `import_model`; None appends the precision to the model's name. Raises ImportRefused, StoreError.
    """
    from models.checkpoints.quantized import quantize_folder

    model = resolve(tag)
    if FAMILIES[model.family].open_format is None:
        raise ImportRefused(
            f"models of the family {model.family} cannot be stored quantised; set CHATGLM_PRECISION={precision}, "
            "and they are quantised while they load"
        )

    def write(folder: Path) -> dict[str, Any]:
        quantize_folder(model.path, folder, precision, progress)
        metadata = {key: value for key, value in model.metadata.items() if key != "imported"}
        original = metadata.get("source_precision", metadata.get("dtype"))
        return metadata | {
            "quantized": precision, "dtype": precision, "source_precision": original, "source": model.tag
        }  # fmt: skip

    return _add(_new_tag(name or f"{model.tag.partition(':')[0]}-{precision}"), write)


def ensure_demo() -> str:
    """The tag of the embedded demonstration model, imported now unless the store has it.

    The version is a hash of the checkpoint, so a changed one is imported anew. Two processes may do this at once.
    """
    from models.demo import CHECKPOINT

    tag = f"{DEMO_NAME}:{_fingerprint(CHECKPOINT)}"
    try:
        return resolve(tag).tag  # a built Bento contains it, outside the user's store
    except StoreError:
        # another process may have stored the same content meanwhile
        with suppress(AlreadyStored):
            import_model("chatglm2", CHECKPOINT, tag, {}, no_progress)
    return tag


def resolve(tag: str) -> StoredModel:
    """The stored model of a tag; `NAME` means its latest version. Raises StoreError."""
    import bentoml
    from bentoml.exceptions import BentoMLException

    try:
        found = bentoml.models.get(tag)
    except (BentoMLException, ValueError):
        present = ", ".join(model.tag for model in stored_models()) or "no models yet"
        raise StoreError(
            f"the model store has no {tag!r} (it has: {present}); "
            f"import it: python -m models.store import FAMILY --from DIR --name {tag}"
        ) from None
    model = _stored_model(found)
    if model is None:
        raise StoreError(f"{found.tag} has no family in its metadata: `python -m models.store` did not import it")
    if model.family not in FAMILIES:
        raise StoreError(f"{model.tag} is of the unknown family {model.family!r}; there are {', '.join(FAMILIES)}")
    return model


def servable(tag: str) -> StoredModel:
    """A stored model that can be served. Raises StoreError, also if it was imported without its tokenizer."""
    model = resolve(tag)
    if model.metadata.get("weights_only"):
        raise StoreError(f"{model.tag} was imported without a tokenizer and cannot be served; import the whole folder")
    return model


def stored_models() -> list[StoredModel]:
    """Every model in the store that this program imported."""
    import bentoml

    found = map(_stored_model, bentoml.models.list()) if store_folder().is_dir() else ()
    return [model for model in found if model is not None]


def _stored_model(model: Model) -> StoredModel | None:
    metadata: Mapping[str, Any] = model.info.metadata
    family = metadata.get("family")
    if not isinstance(family, str):
        return None
    created = model.creation_time.astimezone().isoformat(sep=" ", timespec="minutes")
    return StoredModel(str(model.tag), Path(model.path), family, {**metadata, "imported": created[:16]})


def _family(name: str, options: Mapping[str, str]) -> AnyFamily:
    """A family by its name, if it has these options. Raises ImportRefused."""
    if name not in FAMILIES:
        raise ImportRefused(f"there is no family {name!r}; choose one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    known = {option.name: option for option in family.options}
    for option, value in options.items():
        if option not in known:
            raise ImportRefused(f"the family {name} has no option --{option}")
        choices = known[option].choices
        if choices and value not in choices:
            raise ImportRefused(f"--{option} must be {' or '.join(choices)}, not {value!r}")
    return family


def _new_tag(name: str) -> Tag:
    """A tag with a version that the store does not have. Raises StoreError."""
    from bentoml import Tag
    from bentoml.exceptions import BentoMLException

    try:
        tag = Tag.from_taglike(name.lower())
    except (BentoMLException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"{name!r} cannot name a model ({reason}); choose one with --name NAME[:VERSION]") from None
    if tag.version == "latest":
        raise StoreError(f"{name!r} cannot name a model: `latest` always is the newest version")
    if tag.version is None:
        return tag.make_new_version()
    if (store_folder() / tag.name / tag.version).is_dir():
        raise AlreadyStored(tag)
    return tag


def _add(tag: Tag, write: Callable[[Path], Mapping[str, Any]]) -> str:
    """Move what `write(folder)` writes into the store, with the metadata that it returns, and make it the latest.

    The folder is renamed into the store, so that the store has the whole model or none of it.
    """
    assert tag.version is not None
    # on the file system of the store, so that nothing is copied
    with staging_folder(store_folder().parent) as staging:
        converted = staging / "converted"
        converted.mkdir()
        metadata = write(converted)
        folder = create_model_in(staging / "store", tag, {"family": str(metadata["family"])}, metadata)
        for path in converted.iterdir():
            path.rename(folder / path.name)
        _make_readable(folder)
        versions = store_folder() / tag.name
        versions.mkdir(parents=True, exist_ok=True)
        try:
            move_folder(folder, versions / tag.version)
        except FileExistsError:
            raise AlreadyStored(tag) from None
    latest = versions / f"latest.{tag.version}"
    latest.write_text(tag.version)
    latest.rename(versions / "latest")
    return str(tag)


def _make_readable(folder: Path) -> None:
    """Give every user read access; BentoML makes the folder 0700."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
        elif path.stat().st_nlink == 1:  # a linked file is still the checkpoint's: its mode stays
            path.chmod(0o644)


def _fingerprint(folder: Path) -> str:
    """A version computed from the contents of a folder."""
    digest = hashlib.sha256(CONVERSION.encode())
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
