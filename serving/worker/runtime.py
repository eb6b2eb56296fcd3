"""Settings -> what runs in a worker beside the engine: access policy, admission, shutdown, health monitor, tracing."""

from __future__ import annotations

import asyncio
import logging
import resource
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving import __version__, metrics
from serving.admission.admission_control import Admission, AdmissionLimits
from serving.admission.client_usage import UsageTable
from serving.http.access_log import AccessLog
from serving.http.access_middleware import METRICS_PATH, READY_PATHS, AccessPolicy, ServerState
from serving.http.api_keys import APIKeys, KeyFileError
from serving.http.request_context import RequestContext
from serving.openai.start_generation import DROPPED_ROUNDS_HEADER
from serving.registry import ModelRegistry
from serving.settings import Settings, SettingsError
from serving.shared_folder import make_shared_folder
from serving.worker.graceful_shutdown import ABORT_SECONDS, GracefulShutdown
from serving.worker.health import HealthMonitor
from serving.worker.uvicorn_adapter import UvicornServer

CORS_HEADERS = [
    "x-request-id", "retry-after", "x-should-retry", "openai-processing-ms", DROPPED_ROUNDS_HEADER,
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
]  # fmt: skip

NUM_OTHER_REQUESTS = 1024  # in flight beside those that admission counts: being received, tokenized or refused


@dataclass(frozen=True)
class WorkerRuntime:
    """One worker's. Made while service.py is imported; `running` needs the event loop."""

    policy: AccessPolicy
    admission: Admission
    monitor: HealthMonitor
    shutdown: GracefulShutdown
    flush_traces: Callable[[], None] | None

    @property
    def routes(self) -> list[Route]:
        """/metrics, and what other servers call /readyz and their version."""
        return [
            Route(METRICS_PATH, self.monitor.metrics_response, methods=["GET"]),
            *(Route(path, self.monitor.ready_response, methods=["GET"]) for path in READY_PATHS),
            Route("/version", _version_response, methods=["GET"]),
        ]

    @asynccontextmanager
    async def running(self, each_second: Callable[[], None]) -> AsyncGenerator[None, None]:
        """Signals are handled and the health monitor runs for as long as the block lasts."""
        _raise_open_file_limit()
        server = UvicornServer()
        self.shutdown.install(server)

        def every_second() -> None:
            server.close_idle_connections()
            self.admission.usage_table.refresh()
            metrics.forget_dead_workers()
            each_second()

        monitoring = asyncio.create_task(self.monitor.run(every_second))
        try:
            yield
        finally:
            monitoring.cancel()
            with suppress(asyncio.CancelledError):
                await monitoring
            if self.flush_traces is not None:
                await asyncio.to_thread(self.flush_traces)


def build_runtime(settings: Settings, registry: ModelRegistry, logger: logging.Logger) -> WorkerRuntime:
    """Raises SettingsError for invalid API keys and for an exporter of traces that is not installed."""
    keys = _read_keys(settings)
    folder = make_shared_folder()
    admission = Admission(
        AdmissionLimits(
            settings.max_queued_requests,
            settings.max_queued_tokens,
            settings.client_requests_per_minute,
            settings.client_tokens_per_minute,
            settings.client_max_concurrent,
        ),
        usage_table=UsageTable(folder, 2 * settings.workers) if settings.workers > 1 else UsageTable(),
    )

    def abort() -> None:
        stop_all(registry)

    state = ServerState()
    max_in_flight = settings.max_sequences + settings.max_queued_requests + NUM_OTHER_REQUESTS
    observers: list[Callable[[RequestContext, float], None]] = []
    flush_traces: Callable[[], None] | None = None
    if settings.access_log != "off":
        observers.append(AccessLog(settings.access_log, logger.getChild("access")))
    if settings.otlp_endpoint:
        from serving.worker.tracing import TracingError, start_tracing  # imported only if used

        try:
            tracing = start_tracing(settings.otlp_endpoint, "chatglm2")
        except TracingError as error:
            raise SettingsError(f"CHATGLM_OTLP_ENDPOINT: {error}") from None
        observers.append(tracing)
        flush_traces = tracing.flush
    return WorkerRuntime(
        AccessPolicy(keys, state, settings.public_metrics, settings.public_docs, max_in_flight, tuple(observers)),
        admission,
        HealthMonitor(registry, admission, state, settings.step_seconds),
        GracefulShutdown(state, settings.grace_seconds, abort),
        flush_traces,
    )


async def _version_response(_: Request) -> Response:
    return JSONResponse({"version": __version__})


def stop_all(registry: ModelRegistry) -> None:
    """End every engine, at the same time: their requests in flight get an error."""
    running = [model.running for model in registry.models if model.running is not None]
    threads = [threading.Thread(target=each.engine.stop, args=(ABORT_SECONDS,)) for each in running]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _read_keys(settings: Settings) -> APIKeys | None:
    """None if the settings contain no key. Raises SettingsError."""
    try:
        keys = APIKeys(settings.api_keys, Path(settings.api_keys_file) if settings.api_keys_file else None)
    except KeyFileError as error:
        raise SettingsError(f"CHATGLM_API_KEYS: {error}") from None
    return keys if keys.num_keys else None


def _raise_open_file_limit() -> None:
    """To the most that the system allows this process: every connection is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
