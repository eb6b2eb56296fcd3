"""The name of a repository on a model hub -> a folder on this disk with the files that an import reads.

Hugging Face by `huggingface_hub`, which keeps files in its cache and goes on with what was broken off; ModelScope by
its own client, if that is installed. Code of a repository is downloaded, for what its text says, and never run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

from kernels.precision import Progress
from models.checkpoints.files import first_line, require_space
from models.family import ImportRefused

NAME = re.compile(
    r"(?P<hub>hf:|modelscope:)?(?P<name>[\w.-]+/[\w.-]+?)(?:/(?P<file>[^@]+\.gguf))?(?:@(?P<revision>[\w./-]+))?"
)
DESCRIBING = (".json", ".model", ".txt", ".py", ".jinja", ".tiktoken")
# what trainers save beside a model, and weights of other programs
NOT_WEIGHTS = re.compile(r"consolidated|flax_model|rust_model|tf_model|training_args|optimizer|scheduler|rng_state")
ELSEWHERE = "download the folder on another machine and import it with --from DIR"


@dataclass(frozen=True)
class Repository:
    """`OWNER/NAME`, or `OWNER/NAME/FILE.gguf`, then `@REVISION` where it is not the newest."""

    hub: str  # hf or modelscope
    name: str
    file: str | None = None
    revision: str | None = None

    @property
    def default_name(self) -> str:
        """Of the stored model."""
        return PurePosixPath(self.file or self.name).name.removesuffix(".gguf")

    def __str__(self) -> str:
        prefix = "modelscope:" if self.hub == "modelscope" else ""
        return prefix + self.name + (f"/{self.file}" if self.file else "")


def parse(text: str) -> Repository | None:
    """None for what is a path here: a folder goes before a repository of the same name."""
    found = NAME.fullmatch(text)
    if found is None or (not found["hub"] and Path(text).exists()):
        return None
    hub = (found["hub"] or "hf:").removesuffix(":")
    return Repository(hub, found["name"], found["file"], found["revision"])


def download(repository: Repository, progress: Progress, with_weights: bool = True) -> Path:
    """The folder, or the GGUF file, once its files are here. Raises ImportRefused.

    with_weights: without them the folder is enough to say what it is.
    """
    hub = _ModelScope(repository) if repository.hub == "modelscope" else _HuggingFace(repository)
    sizes = hub.files()
    chosen = choose(repository, sizes, with_weights)
    missing = [name for name in chosen if not hub.has(name)]
    require_space(hub.cache(), sum(sizes[name] for name in missing))
    total = sum(sizes[name] for name in chosen)
    done = total - sum(sizes[name] for name in missing)
    progress(done, total, f"from {repository}")
    for name in missing:
        hub.fetch(name, _FileProgress(progress, done, total, name))
        done += sizes[name]
        progress(done, total, name)
    return hub.folder() / (repository.file or "")


def choose(repository: Repository, sizes: Mapping[str, int], with_weights: bool = True) -> list[str]:
    """The files that an import reads: safetensors where there are any, else torch's own files. Raises ImportRefused."""
    if repository.file is not None:
        if repository.file not in sizes:
            raise ImportRefused(f"{repository.name} has no file {repository.file}{_listed(sizes)}")
        return [repository.file]
    parts = {name: PurePosixPath(name) for name in sizes}
    describing = [
        name
        for name, path in parts.items()
        if path.suffix in DESCRIBING and (len(path.parts) == 1 or (path.name == "config.json" and len(path.parts) == 2))
    ]
    in_root = [name for name, path in parts.items() if len(path.parts) == 1 and not NOT_WEIGHTS.match(name)]
    tensors, pickles = ([name for name in in_root if name.endswith(end)] for end in (".safetensors", ".bin"))
    weights = tensors or pickles
    if not weights:
        raise ImportRefused(f"{repository} has no weights in .safetensors or .bin{_listed(sizes)}")
    return sorted(describing + (weights if with_weights else []))


def _listed(sizes: Mapping[str, int]) -> str:
    found = sorted(name for name in sizes if name.endswith(".gguf"))
    return f"; name one of its GGUF files: {', '.join(found[:6])}" if found else ""


class _FileProgress:
    """Takes the place of tqdm for one file: the hub's client calls it with the bytes that have come."""

    def __init__(self, progress: Progress, before: int, total: int, name: str) -> None:
        self._progress, self._done, self._total, self._name = progress, before, total, name

    def __call__(self, *_: object, initial: int = 0, **__: object) -> Self:
        self._done += initial
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, num_bytes: float | None = 1) -> None:
        self._done += int(num_bytes or 0)
        self._progress(min(self._done, self._total), self._total, self._name)

    def close(self) -> None:
        pass

    def refresh(self) -> None:
        pass

    def set_postfix_str(self, *_: object, **__: object) -> None:
        pass

    def set_description(self, *_: object, **__: object) -> None:
        pass


class _HuggingFace:
    """One repository, at the commit that its revision is now."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._commit = ""

    def files(self) -> dict[str, int]:
        """Name -> bytes."""
        from huggingface_hub import HfApi

        with self._refusals("its list of files"):
            found = HfApi().model_info(
                self._repository.name, revision=self._repository.revision, files_metadata=True, timeout=30
            )
        self._commit = str(found.sha)
        return {each.rfilename: int(each.size or 0) for each in found.siblings or ()}

    def cache(self) -> Path:
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = Path(HF_HUB_CACHE)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def has(self, name: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(self._repository.name, name, revision=self._commit), str)

    def fetch(self, name: str, progress: Any) -> None:
        from huggingface_hub import hf_hub_download

        with self._refusals(name):
            hf_hub_download(self._repository.name, name, revision=self._commit, tqdm_class=progress)

    def folder(self) -> Path:
        repository = "models--" + self._repository.name.replace("/", "--")
        return self.cache() / repository / "snapshots" / self._commit

    @contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        from huggingface_hub import constants, errors

        name, endpoint = self._repository.name, constants.ENDPOINT
        try:
            yield
        except errors.GatedRepoError:
            raise ImportRefused(
                f"{name} asks for consent: give it on its page at {endpoint}, then set HF_TOKEN"
            ) from None
        except errors.RevisionNotFoundError:
            raise ImportRefused(f"{name} has no revision {self._repository.revision}") from None
        except errors.RepositoryNotFoundError:
            raise ImportRefused(f"{endpoint} has no {name}, or it is private: then set HF_TOKEN") from None
        except OSError as error:  # the client's own errors of connections and of HTTP are OSErrors, too
            if error.filename is not None:  # a file of this machine
                raise
            raise ImportRefused(self._unreachable(what, error)) from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "huggingface_hub"):
                raise
            raise ImportRefused(self._unreachable(what, error)) from None

    def _unreachable(self, what: str, error: Exception) -> str:
        from huggingface_hub import constants

        return (
            f"{what} of {self._repository.name} did not come from {constants.ENDPOINT} ({first_line(error)[:160]}); "
            f"run the command again to go on, set HF_ENDPOINT to a mirror, or {ELSEWHERE}"
        )


class _ModelScope:
    """The same by the package modelscope, in its own cache."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        try:
            import modelscope  # noqa: F401
        except ImportError:
            raise ImportRefused(
                f"{repository} needs ModelScope's client: pip install modelscope; or {ELSEWHERE}"
            ) from None

    def files(self) -> dict[str, int]:
        """Name -> bytes."""
        from modelscope.hub.api import HubApi

        with self._refusals():
            found: Sequence[Mapping[str, Any]] = HubApi().get_model_files(
                self._repository.name, revision=self._repository.revision or "master", recursive=True
            )
        return {str(each["Path"]): int(each.get("Size") or 0) for each in found if each.get("Type") != "tree"}

    def cache(self) -> Path:
        from modelscope.utils.file_utils import get_model_cache_root

        folder = Path(get_model_cache_root())
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def has(self, name: str) -> bool:
        return False  # its client looks, and fetches what is not there

    def fetch(self, name: str, progress: Any) -> None:
        from modelscope.hub.file_download import model_file_download

        with self._refusals():
            file = model_file_download(self._repository.name, name, revision=self._repository.revision or "master")
        self._folder = Path(str(file).removesuffix(name))

    def folder(self) -> Path:
        return self._folder

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - its client documents no exceptions
            raise ImportRefused(
                f"{self._repository} could not be downloaded ({first_line(error)[:200]}); "
                f"run the command again to go on, or {ELSEWHERE}"
            ) from None
