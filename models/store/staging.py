"""A temporary folder, removed after a failure at once and after a kill by the next process; moving it to its target."""

from __future__ import annotations

import errno
import fcntl
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "importing-"
LOCK = "lock"
GRACE_SECONDS = 60.0  # between making a folder and locking it


@contextmanager
def staging_folder(root: Path) -> Iterator[Path]:
    """An empty folder inside `root`, removed at the end of the block. Raises OSError if root cannot be written.

    Folders of processes that were killed are removed first: the lock on a folder ends with its process.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(root)
    folder = root / f"{PREFIX}{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        with (folder / f"{LOCK}.new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # renamed after it is locked: no other process can find it unlocked
            (folder / f"{LOCK}.new").rename(folder / LOCK)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_folder(folder: Path, target: Path) -> None:
    """Rename a folder to `target`, or copy it if that is on another file system.

    Raises FileExistsError if `target` exists and is not empty, OSError if it cannot be written.
    """
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(error.errno, "already there", str(target)) from None
        if error.errno != errno.EXDEV:
            raise
        _copy_folder(folder, target)


def _copy_folder(folder: Path, target: Path) -> None:
    target.mkdir()
    try:
        shutil.copytree(folder, target, dirs_exist_ok=True)
    except BaseException:  # an interrupt too: half a folder must not remain
        shutil.rmtree(target, ignore_errors=True)
        raise


def _remove_abandoned(root: Path) -> None:
    for folder in root.glob(f"{PREFIX}*"):
        try:
            with (folder / LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue  # another process is using it
        except FileNotFoundError:
            if _age_seconds(folder) > GRACE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _age_seconds(folder: Path) -> float:
    try:
        return time.time() - folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # its owner has just removed it
