"""Lists the files of this project that one streamed chat request runs, in order of first entry.

    .venv/bin/python -m benchmarks.request_path

The demonstration model answers on the CPU, behind the middleware and the application that `service.py` composes.
Python's profile hook sees every call of every thread; what is imported or warmed up earlier does not count.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from starlette.types import ASGIApp, Message

from models.demo import CHECKPOINT
from models.families import FAMILIES
from models.store.progress import no_progress
from serving.http.access_middleware import AccessMiddleware, RouteNames
from serving.http.json_body import BodyLimits, BodyMiddleware
from serving.openai.limits import ApiLimits
from serving.openai.router import create_app
from serving.registry import ModelRegistry, ServedModel
from serving.settings import Settings
from serving.worker.model_source import ModelSource
from serving.worker.runtime import build_runtime
from serving.worker.start_native import start_model

REPOSITORY = Path(__file__).resolve().parent.parent
REQUEST = {"model": "chatglm2-demo", "stream": True, "messages": [{"role": "user", "content": "你好"}]}
HEADERS = [(b"host", b"localhost"), (b"content-type", b"application/json")]


class EntryRecorder:
    """A profile hook that notes each file of the repository when a function of it is first called."""

    def __init__(self) -> None:
        self.is_recording = False
        self.files: dict[str, str] = {}  # path in the repository -> the function that was called first
        self._ours: dict[str, str | None] = {}

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if not self.is_recording or event != "call" or frame.f_code.co_name == "<module>":
            return
        filename = frame.f_code.co_filename
        if filename not in self._ours:
            self._ours[filename] = _path_in_repository(filename)
        path = self._ours[filename]
        if path is not None and path not in self.files:
            self.files[path] = frame.f_code.co_qualname

    @contextmanager
    def in_new_threads(self) -> Iterator[None]:
        """Called in the threads that begin while the block lasts."""
        previous = threading.getprofile()
        threading.setprofile(self)
        try:
            yield
        finally:
            threading.setprofile(previous)  # type: ignore[arg-type]  # None takes the hook away

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Called in this thread, too, and noting files, while the block lasts."""
        previous = sys.getprofile()
        self.is_recording = True
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(previous)
            self.is_recording = False


def _path_in_repository(filename: str) -> str | None:
    path = Path(filename)
    if not path.is_relative_to(REPOSITORY):
        return None
    relative = path.relative_to(REPOSITORY)
    return relative.as_posix() if relative.parts[0] in ("serving", "models", "kernels", "service.py") else None


def request_path() -> dict[str, str]:
    """The path of each file that one streamed chat request enters, with the function that is called first in it."""
    recorder = EntryRecorder()
    with (
        tempfile.TemporaryDirectory() as folder,
        recorder.in_new_threads(),
        application(Path(folder)) as app,
        recorder.recording(),
    ):
        status, body = asyncio.run(stream_chat(app))
    if status != 200 or not body.endswith(b"data: [DONE]\n\n"):
        raise RuntimeError(f"the request failed with status {status}: {body.decode()}")
    return recorder.files


@contextmanager
def application(folder: Path) -> Iterator[ASGIApp]:
    """The demonstration model behind everything that a request passes, BentoML and uvicorn excepted."""
    family = FAMILIES["chatglm2"]
    settings = Settings(device="cpu", precision="float32", threads=1, kv_cache_gib=0.05)
    logger = logging.getLogger("benchmarks.request_path")
    metadata = family.import_checkpoint(CHECKPOINT, folder, {}, no_progress)
    abilities, open_format = family.abilities, family.open_format
    source = ModelSource("chatglm2-demo:1", folder, "chatglm2", metadata, abilities, family.load, open_format, settings)
    model = start_model(source, settings, logger).running
    registry = ModelRegistry([ServedModel("chatglm2-demo", running=model)])
    try:
        runtime = build_runtime(settings, registry, logger)
        app = create_app(registry, ApiLimits(), admission=runtime.admission)
        yield AccessMiddleware(
            BodyMiddleware(app, BodyLimits()), policy=runtime.policy, route_names=RouteNames(app.routes)
        )
    finally:
        model.engine.stop()


async def stream_chat(app: ASGIApp) -> tuple[int, bytes]:
    """Send REQUEST to the application; its status and its whole body."""
    path = "/chat/completions"
    body = json.dumps(REQUEST).encode()
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [*HEADERS, (b"content-length", str(len(body)).encode())],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
    }
    incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    connected = asyncio.Event()  # never set: this client stays until its answer ends
    status, pieces = 0, []

    async def receive() -> Message:
        if not incoming:
            await connected.wait()
        return incoming.pop()

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            pieces.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(pieces)


def listing(files: dict[str, str]) -> str:
    """One line a file: its number, its path, and what is called first in it."""
    return "\n".join(f"{number:3} {path:55} {name}" for number, (path, name) in enumerate(files.items(), 1))


if __name__ == "__main__":
    print(listing(request_path()))
