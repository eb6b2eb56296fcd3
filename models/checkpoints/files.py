"""The files of checkpoint folders: JSON, Git LFS pointers, hard links and free disk space."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from models.family import ImportRefused

LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ImportRefused."""
    if not path.is_file():
        raise ImportRefused(f"{path.parent} has no {path.name}: give the folder of a downloaded checkpoint")
    refuse_lfs_pointer(path)
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ImportRefused(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise ImportRefused(f"{path} does not hold a JSON object: download it again")
    return cast("dict[str, Any]", value)


def read_optional(path: Path) -> dict[str, Any]:
    """The same; {} where there is no such file."""
    return read_json(path) if path.is_file() else {}


def first_line(error: Exception) -> str:
    """What an exception of a library says, for a message of one line."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]


def positive_int(config: Mapping[str, Any], name: str) -> int:
    """A value of `config.json` that must be a positive integer. Raises ImportRefused."""
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ImportRefused(f"config.json has no usable {name!r} ({value!r}); it must be a positive integer")
    return value


def is_lfs_pointer(path: Path) -> bool:
    """Whether it is the text file that a clone without Git LFS has instead of a large file."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def refuse_lfs_pointer(path: Path) -> None:
    """Raise ImportRefused for such a file."""
    if is_lfs_pointer(path):
        raise ImportRefused(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}")


def has_role_tokens(source: Path) -> bool | None:
    """Whether the checkpoint's own tokenizer has ChatGLM3's role tokens; None if the folder does not say."""
    texts = [
        (source / name).read_text(encoding="utf-8", errors="replace")
        for name in ("tokenization_chatglm.py", "tokenizer_config.json")
        if (source / name).is_file()
    ]
    if any("<|user|>" in text for text in texts):
        return True
    return False if any("[Round {}]" in text for text in texts) else None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a readable JSON file that every user may read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path.chmod(0o644)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise ImportRefused, before anything is written, if the file system of `folder` has too little free space."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ImportRefused(
            f"the import needs {num_bytes / 1e9:.1f} GB in {folder}, where only {free / 1e9:.1f} GB are free"
        )


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows it, else a copy. Follows symbolic links."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(source, target)
