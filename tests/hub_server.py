"""A server on loopback that speaks the routes of a model hub that its client uses, over a folder of repositories."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """root: OWNER/NAME/FILES. breaks: names of files whose next transfer ends after so many bytes."""

    root: Path
    token: str | None = None
    breaks: dict[str, int] = field(default_factory=dict[str, int])
    fetched: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # (file, its range or "")
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        if self.hub.token is not None and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            return self._refuse(401, "GatedRepo")
        if path.startswith("/api/models/"):
            return self._describe(path.removeprefix("/api/models/"))
        name, _, rest = path.strip("/").partition("/resolve/")
        file = self.hub.root / name / rest.partition("/")[2]
        return self._send_file(file) if file.is_file() else self._refuse(404, "EntryNotFound")

    def _describe(self, name: str) -> None:
        name, _, revision = name.partition("/revision/")
        folder = self.hub.root / name
        if not folder.is_dir():
            return self._refuse(404, "RepoNotFound")
        if revision not in ("", "main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listed = [{"rfilename": str(f.relative_to(folder)), "size": f.stat().st_size} for f in files]
        return self._send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": listed}).encode(), {})

    def _send_file(self, file: Path) -> None:
        data, start = file.read_bytes(), 0
        given = self.headers.get("range") or ""
        if given.startswith("bytes="):
            start = int(given.removeprefix("bytes=").partition("-")[0])
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"etag": etag, "x-repo-commit": COMMIT, "accept-ranges": "bytes"}
        if start:
            headers["content-range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            self.hub.fetched.append((file.name, given))
        stop = self.hub.breaks.pop(file.name, None) if self.command == "GET" else None
        self._send(206 if start else 200, data[start:], headers, stop)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"x-error-code": code, "x-error-message": code})

    def _send(self, status: int, data: bytes, headers: dict[str, str], stop: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:stop])
            if stop is not None:
                self.close_connection = True


@contextmanager
def running_hub(hub: Hub) -> Iterator[Hub]:
    """Serve until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
