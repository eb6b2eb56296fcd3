"""Puts a model, with its family, into the Bento model store, and finds it again. Knows no architecture.

    python -m models.store import chatglm2 --from DIR [--name NAME[:VERSION]]
    python -m models.store quantize NAME[:VERSION] int8|int4 [--name NAME[:VERSION]]
    python -m models.store list

bentoml is imported inside the functions: it is slow, and a refusal should not wait for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.precision import Progress
from models.families import FAMILIES
from models.family import Family, ImportRefused
from models.store.progress import no_progress
from models.store.staging import move_folder, staging_folder

if TYPE_CHECKING:
    from bentoml import Model, Tag

    from kernels.quantization import Small

DEMO_NAME = "chatglm2-demo"
CONVERSION = "1"  # raise it when what an import writes changes, so that the demo is imported anew


class StoreError(Exception):
    """The store cannot do this; the message is one clear line for a person."""


class AlreadyStored(StoreError):
    """There is a model with this tag."""


@dataclass(frozen=True)
class StoredModel:
    """A model in the store that was put there by this program."""

    tag: str
    path: Path
    family: str
    metadata: Mapping[str, Any]


def import_model(family: str, source: Path, name: str | None, options: Mapping[str, str], progress: Progress) -> str:
    """Convert the checkpoint folder `source` into the store; return its tag. Raises ImportRefused, StoreError.

    name: `NAME` (the version is made up) or `NAME:VERSION`; None takes the folder's name. Nothing stays behind if it
    fails or is interrupted, and what a killed import left is removed by the next one.
    """
    plug = _family(family, options)
    if not source.is_dir():
        raise ImportRefused(f"{source} is not a folder")
    source = source.resolve()
    tag = _new_tag(name or source.name)
    # beside the store's own folder: what is finished moves in by one rename
    with staging_folder(_store_dir().parent) as staging:
        converted = staging / "converted"
        converted.mkdir()
        metadata = plug.import_checkpoint(source, converted, options, progress)
        metadata |= {"family": family, "source": source.name, "options": dict(options)}
        size = sum(path.stat().st_size for path in converted.rglob("*"))
        progress(size, size, "into the store")  # the last moment at which the caller may raise to end it
        folder = _register(tag, metadata, converted, staging / "store")
        _move_in(folder, tag)
    return str(tag)


def quantize_model(tag: str, precision: Small, name: str | None, progress: Progress) -> str:
    """Put a stored model into the store again with weights of 8 or 4 bits, which load faster and take less room; return
    the new tag. Raises ImportRefused, StoreError.

    name: as for `import_model`; None adds the precision to the model's own name.
    """
    from models.checkpoints.quantized import quantize_folder

    stored = resolve(tag)
    if FAMILIES[stored.family].open_format is None:
        raise ImportRefused(f"a model of the family {stored.family} is quantised while it loads: CHATGLM_PRECISION")
    new_tag = _new_tag(name or f"{stored.tag.partition(':')[0]}-{precision}")
    with staging_folder(_store_dir().parent) as staging:
        converted = staging / "converted"
        converted.mkdir()
        quantize_folder(stored.path, converted, precision, progress)
        metadata = {key: value for key, value in stored.metadata.items() if key != "imported"}
        before = metadata.get("source_precision", metadata.get("dtype"))
        metadata |= {"quantized": precision, "dtype": precision, "source_precision": before, "source": stored.tag}
        _move_in(_register(new_tag, metadata, converted, staging / "store"), new_tag)
    return str(new_tag)


def ensure_demo() -> str:
    """The tag of the embedded demonstration model, imported now if the store does not have it yet.

    The version follows from the checkpoint, so a changed one is imported anew. Two processes may do this at once.
    """
    from models.demo import CHECKPOINT

    tag = f"{DEMO_NAME}:{_fingerprint(CHECKPOINT)}"
    try:
        return resolve(tag).tag  # a built Bento brings it along, outside the user's store
    except StoreError:
        # stored already: another process was faster with the same content
        with suppress(AlreadyStored):
            import_model("chatglm2", CHECKPOINT, tag, {}, no_progress)
    return tag


def resolve(tag: str) -> StoredModel:
    """The stored model of a tag, `NAME` meaning its latest version. Raises StoreError."""
    import bentoml
    from bentoml.exceptions import BentoMLException

    try:
        model = bentoml.models.get(tag)
    except (BentoMLException, ValueError):
        present = ", ".join(stored.tag for stored in stored_models()) or "nothing yet"
        raise StoreError(
            f"the model store has no {tag!r} (it has: {present}); "
            f"import it: python -m models.store import FAMILY --from DIR --name {tag}"
        ) from None
    stored = _stored(model)
    if stored is None:
        raise StoreError(
            f"the stored model {model.tag} does not say its family: it was not put there by `python -m models.store`"
        )
    if stored.family not in FAMILIES:
        raise StoreError(f"{model.tag} is of the family {stored.family!r}, but there are only: {', '.join(FAMILIES)}")
    return stored


def servable(tag: str) -> StoredModel:
    """A stored model that can be served. Raises StoreError, also for one that was imported without its tokenizer."""
    stored = resolve(tag)
    if stored.metadata.get("weights_only"):
        raise StoreError(f"{stored.tag} was imported without a tokenizer and cannot be served; import the whole folder")
    return stored


def stored_models() -> list[StoredModel]:
    """Every model in the store that this program put there."""
    import bentoml

    found = (_stored(model) for model in bentoml.models.list()) if _store_dir().is_dir() else ()
    return [stored for stored in found if stored is not None]


def _stored(model: Model) -> StoredModel | None:
    metadata: Mapping[str, Any] = model.info.metadata
    family = metadata.get("family")
    if not isinstance(family, str):
        return None
    when = model.creation_time.astimezone().isoformat(sep=" ", timespec="minutes")
    return StoredModel(str(model.tag), Path(model.path), family, {**metadata, "imported": when[:16]})


def _family(name: str, options: Mapping[str, str]) -> Family:
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


def _store_dir() -> Path:
    from bentoml._internal.configuration.containers import BentoMLContainer

    return Path(BentoMLContainer.model_store_dir.get())


def _new_tag(name: str) -> Tag:
    """A complete tag that the store does not have. Raises StoreError."""
    from bentoml import Tag
    from bentoml.exceptions import BentoMLException

    try:
        tag = Tag.from_taglike(name.lower())
    except (BentoMLException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"{name!r} cannot name a model ({reason}); choose one with --name NAME[:VERSION]") from None
    if tag.version == "latest":
        raise StoreError(f"{name!r} cannot name a model: the store itself keeps track of what is latest")
    if tag.version is None:
        return tag.make_new_version()
    if _exists(str(tag)):
        raise _already_stored(tag)
    return tag


def _already_stored(tag: Tag) -> AlreadyStored:
    return AlreadyStored(
        f"the model store has {tag} already: choose another version, or first `bentoml models delete {tag}`"
    )


def _exists(tag: str) -> bool:
    return (_store_dir() / tag.replace(":", "/")).is_dir()


def _register(tag: Tag, metadata: Mapping[str, Any], converted: Path, store: Path) -> Path:
    """Let BentoML describe the model in a store of its own, then move the weights in: nothing is copied.

    Returns the complete model folder, readable by every user.
    """
    import bentoml
    from bentoml._internal.models import ModelStore

    store.mkdir()
    labels = {"family": str(metadata["family"])}
    staged = ModelStore(store)
    with bentoml.models.create(tag, labels=labels, metadata=dict(metadata), _model_store=staged):
        pass  # model.yaml is all that BentoML has to write
    folder = Path(staged.get(tag).path)
    for path in converted.iterdir():
        path.rename(folder / path.name)
    folder.chmod(0o755)  # BentoML makes it 0700, which another user's server cannot enter
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
        elif path.stat().st_nlink == 1:  # a linked file is still the source's: its mode is not ours
            path.chmod(0o644)
    return folder


def _move_in(folder: Path, tag: Tag) -> None:
    """Into the store at once, so that it has the whole model or none of it; the newest import is the latest."""
    assert tag.version is not None
    home = _store_dir() / tag.name
    home.mkdir(parents=True, exist_ok=True)
    try:
        move_folder(folder, home / tag.version)
    except FileExistsError:
        raise _already_stored(tag) from None
    latest = home / f"latest.{tag.version}"
    latest.write_text(tag.version)
    latest.rename(home / "latest")


def _fingerprint(folder: Path) -> str:
    """A version made of what a folder holds."""
    digest = hashlib.sha256(CONVERSION.encode())
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
