"""What keeps one worker going: the gate, the door, the way out, and the watch. Composition from settings, no rules."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.routing import Route

from serving.admission.admission_control import Admission, AdmissionLimits
from serving.admission.client_usage import UsageTable
from serving.http.access_log import AccessLog
from serving.http.access_middleware import METRICS_PATH, AccessPolicy, RouteNames
from serving.http.api_keys import KeyFileError, Keys
from serving.http.request_context import RequestContext
from serving.openai.start_generation import DROPPED_ROUNDS_HEADER
from serving.registry import ModelRegistry
from serving.settings import Settings, SettingsError
from serving.worker.graceful_shutdown import GracefulShutdown
from serving.worker.health import HealthMonitor
from serving.worker.uvicorn_adapter import IdleConnections, allow_many_connections

CUT_SECONDS = 5.0
SHARED_FOLDER = "SERVING_ACCOUNTS"  # the parent process of the workers tells them where it is
CORS_HEADERS = [
    "x-request-id", "retry-after", "x-should-retry", "openai-processing-ms", DROPPED_ROUNDS_HEADER,
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
]  # fmt: skip


@dataclass(frozen=True)
class WorkerRuntime:
    """One worker's."""

    admission: Admission
    drain: GracefulShutdown
    monitor: HealthMonitor
    keys: Keys
    settings: Settings
    finished: Callable[[RequestContext, float], None]
    close_traces: Callable[[], None]

    @property
    def metrics_route(self) -> Route:
        return Route(METRICS_PATH, self.monitor.exposition, methods=["GET"])

    def guard(self, apps: Iterable[Starlette]) -> AccessPolicy:
        """For the gate in front of these applications."""
        routes = [route for app in apps for route in app.routes if isinstance(route, Route)]
        return AccessPolicy(
            self.keys,
            self.drain,
            RouteNames(routes),
            self.settings.public_metrics,
            self.settings.public_docs,
            self.finished,
        )

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Signals taken over and the watch kept, while a worker serves."""
        allow_many_connections()
        connections = IdleConnections()
        self.drain.install()

        def look() -> None:
            connections.sweep()
            self.admission.accounts.look()

        watching = asyncio.create_task(self.monitor.run(look))
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await asyncio.to_thread(self.close_traces)


def prepare(settings: Settings, served: ModelRegistry, logger: logging.Logger) -> WorkerRuntime:
    """Raises SettingsError for keys that cannot be read or traces that cannot be sent."""
    try:
        keys = Keys(settings.api_key_list, Path(settings.api_keys_file) if settings.api_keys_file else None)
    except KeyFileError as error:
        raise SettingsError(f"CHATGLM_API_KEYS: {error}") from None
    admission = Admission(
        AdmissionLimits(
            settings.max_queued_requests,
            settings.max_queued_tokens,
            settings.client_requests_per_minute,
            settings.client_tokens_per_minute,
            settings.client_max_concurrent,
        ),
        accounts=UsageTable(shared_folder(), 2 * settings.workers) if settings.workers > 1 else UsageTable(),
    )

    def cut() -> None:
        if served.model is not None:
            served.model.engine.stop(CUT_SECONDS)

    drain = GracefulShutdown(settings.grace_seconds, cut)
    log = AccessLog(settings.access_log, logger.getChild("access"))
    trace, close_traces = _tracing(settings, served)

    def finished(record: RequestContext, seconds: float) -> None:
        log(record, seconds)
        if trace is not None:
            trace(record, seconds)

    monitor = HealthMonitor(served, admission, drain, settings.step_seconds)
    return WorkerRuntime(admission, drain, monitor, keys, settings, finished, close_traces)


def shared_folder() -> Path:
    """Where the workers of this server keep their accounts: made by the parent process, and removed at its end."""
    folder = os.environ.get(SHARED_FOLDER)
    if folder is None or not Path(folder).is_dir():
        folder = os.environ[SHARED_FOLDER] = tempfile.mkdtemp(prefix="chatglm-accounts-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _tracing(
    settings: Settings, served: ModelRegistry
) -> tuple[Callable[[RequestContext, float], None] | None, Callable[[], None]]:
    if not settings.otlp_endpoint:
        return None, lambda: None
    from serving.worker.tracing import TracingError, start_tracing  # costs nothing where it is off

    try:
        tracing = start_tracing(settings.otlp_endpoint, "chatglm2", served.name)
    except TracingError as error:
        raise SettingsError(f"CHATGLM_OTLP_ENDPOINT: {error}") from None
    return tracing, tracing.flush


def pass_on_second_signal() -> None:
    """In the parent process of `bentoml serve`: a second SIGTERM or SIGINT reaches the workers.

    BentoML's process manager forgets every signal after the first. It takes signals with `signal.signal`, so the
    wake-up descriptor is free for a reader that only counts.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    writing.detach()  # it belongs to the interpreter from here on

    def count() -> None:
        seen = 0
        while numbers := reading.recv(64):
            for number in numbers:
                if number in (signal.SIGTERM, signal.SIGINT):
                    seen += 1
                    if seen > 1:
                        _signal_children(signal.SIGTERM)

    threading.Thread(target=count, name="signals", daemon=True).start()


def _signal_children(number: int) -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            os.kill(child.pid, number)
