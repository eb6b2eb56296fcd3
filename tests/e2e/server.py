"""A real `bentoml serve` in a process of its own, on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

from tests.golden_data import REPOSITORY

BENTOML = [sys.executable, "-m", "bentoml"]
START_SECONDS = int(os.environ.get("TEST_START_SECONDS", "120"))
VLLM = {
    "CHATGLM_ENGINE": "vllm",
    "CHATGLM_PRECISION": "float32",
    "CHATGLM_KV_CACHE_GIB": "0.25",
    "CHATGLM_VLLM_OPTIONS": '{"enforce_eager": true, "max_model_len": 4096}',
}


@dataclass(frozen=True)
class Server:
    """Where a running server answers, and its process."""

    url: str  # http://127.0.0.1:PORT
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def metrics(self, headers: Mapping[str, str] | None = None) -> dict[str, float]:
        """See `totals`."""
        reply = requests.get(f"{self.url}/metrics", headers=headers, timeout=30)
        assert reply.status_code == 200
        return totals(reply.text)


def totals(exposition: str) -> dict[str, float]:
    """The text of /metrics -> every value under its name and labels, and the sum over the labels under the name."""
    values: dict[str, float] = {}
    for line in exposition.splitlines():
        if line and line[0] != "#":
            full_name, _, value = line.rpartition(" ")
            values[full_name] = values.get(full_name, 0.0) + float(value)
            if full_name[-1] == "}":
                name = full_name.partition("{")[0]
                values[name] = values.get(name, 0.0) + float(value)
    return values


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with a Bento store of its own and no settings left over."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CHATGLM_", "BENTOML_"))}
    return {
        **kept,
        "BENTOML_HOME": str(home),
        "BENTOML_DO_NOT_TRACK": "true",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}",
        **(extra or {}),
    }


@contextmanager
def serving(
    home: Path, settings: Mapping[str, str] | None = None, target: str | None = None, wait: bool = True
) -> Iterator[Server]:
    """Start `bentoml serve`, wait until it is ready, end it with SIGTERM.

    The model computes on one thread unless `settings` says otherwise: two spin while they wait for each other whenever
    a test or its client has one of the cores.
    """
    port = free_port()
    log = home / f"serve-{port}.log"
    home.mkdir(parents=True, exist_ok=True)
    command = [*BENTOML, "serve", *([target] if target else []), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY if target is None else home,
            env=environment(home, {"CHATGLM_THREADS": "1", **(settings or {})}),
            stdout=output,
            stderr=output,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        if wait:
            wait_until_ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.process.poll() is None, f"the server ended early:\n{server.log.read_text()}"
        try:
            if requests.get(f"{server.url}/readyz", timeout=2).status_code == 200:
                return
        except requests.RequestException:
            pass  # the port is not open yet
        time.sleep(0.1)
    raise AssertionError(f"the server did not become ready:\n{server.log.read_text()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
