"""A folder in memory that the workers of one server share: their clients' usage and their metrics.

The parent process makes it when it imports the service and removes it at its end; workers find it by an environment
variable. It is in tmpfs where there is one, since these files are mapped: a write to a mapped file on a full disk kills
the process (SIGBUS).
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

VARIABLE = "SERVING_SHARED_FOLDER"
TMPFS = Path("/dev/shm")
PREFIX = "chatglm-"  # then the process that made it
FAILED = "load-failed"  # a file in it
MULTIPROCESS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # set by BentoML for its workers


def make_shared_folder() -> Path:
    """In the parent process: make it, for as long as the process runs. In a worker: the one that its parent made."""
    if (found := shared_folder()) is not None:
        return found
    parent = TMPFS if os.access(TMPFS, os.W_OK) else Path(tempfile.gettempdir())
    _remove_abandoned(parent)
    folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent)
    os.environ[VARIABLE] = folder
    atexit.register(_remove_own, folder, os.getpid())
    return Path(folder)


def shared_folder() -> Path | None:
    """The one that this process made, or in a worker its parent; None if neither did.

    A server that is started by a process which has imported the service inherits a variable that is not its own.
    """
    folder = Path(os.environ.get(VARIABLE, ""))
    makers = (os.getpid(), os.getppid()) if MULTIPROCESS_DIRECTORY in os.environ else (os.getpid(),)
    is_ours = folder.name.startswith(tuple(f"{PREFIX}{process}-" for process in makers))
    return folder if is_ours and folder.is_dir() else None


def end_server() -> None:
    """In a worker that cannot load its model: the whole server shuts down, with exit code 1."""
    if (folder := shared_folder()) is not None:
        (folder / FAILED).touch()
    os.kill(os.getppid(), signal.SIGTERM)


def _remove_own(folder: str, process: int) -> None:
    if os.getpid() != process:  # a forked child runs its parent's exit functions
        return
    has_failed = Path(folder, FAILED).exists()
    shutil.rmtree(folder, ignore_errors=True)
    if has_failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # BentoML exits with 0 after SIGTERM


def _remove_abandoned(parent: Path) -> None:
    """Of parent processes that were killed."""
    for folder in parent.glob(f"{PREFIX}*-*"):
        process = folder.name.removeprefix(PREFIX).partition("-")[0]
        if process.isdigit() and Path("/proc/self").exists() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(folder, ignore_errors=True)
