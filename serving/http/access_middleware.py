"""The outermost layer of the whole server, BentoML's own pages included: who may pass, what is counted and logged.

Knows paths and headers, no bodies. Health checks pass untouched, always.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import metrics
from serving.http.api_keys import Keys
from serving.http.errors import APIError, error_response, shutting_down, unknown_url
from serving.http.request_context import RequestContext, header, request_context
from serving.worker.graceful_shutdown import GracefulShutdown

HEALTH_PATHS = frozenset({"/livez", "/readyz", "/healthz"})
METRICS_PATH = "/metrics"
BENTOML_PATHS = ("/", "/generate", "/docs.json", "/schema.json")
DOCUMENTS = ("/docs", "/docs.json", "/schema.json", "/openapi.json", "/v1/docs", "/v1/openapi.json", "/static_content/")
CHAT_PAGE, PAGE_FILES = "/chat", "/page/"  # they hold no secret, and ask for the key themselves
MAX_HEADER_BYTES, MAX_HEADERS = 32 * 1024, 100
CLIENT_LEFT = 499  # the status that access logs know for it; nobody reads it


class RouteNames:
    """Path -> the route it belongs to: a small, fixed set of names, whatever is asked for."""

    def __init__(self, routes: Iterable[Route], prefixes: Iterable[str] = ("", "/v1")) -> None:
        patterns = [prefix + route.path for route in routes for prefix in prefixes if not route.path.startswith("/{")]
        heads = [pattern.split("{")[0] for pattern in patterns if "{" in pattern]
        self._heads = (*heads, "/static_content/")
        self._exact = frozenset((*(pattern for pattern in patterns if "{" not in pattern), *BENTOML_PATHS))

    def of(self, path: str) -> str:
        if path in self._exact:
            return path
        return next((head + "..." for head in self._heads if path.startswith(head)), "unknown")


@dataclass(frozen=True)
class AccessPolicy:
    """What the gate goes by."""

    keys: Keys
    drain: GracefulShutdown
    route_names: RouteNames
    metrics_are_public: bool = False
    documents_are_public: bool = False
    finished: Callable[[RequestContext, float], None] | None = None  # told of every request, with its seconds


class AccessMiddleware:
    """ASGI middleware around everything."""

    def __init__(self, app: ASGIApp, guard: AccessPolicy) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in HEALTH_PATHS:
            await self._app(scope, receive, send)
            return
        record = request_context(scope)

        async def send_labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                for name, value in record.headers.items():
                    headers[name] = value
            await send(message)

        self._guard.drain.num_in_flight += 1
        metrics.HTTP_IN_PROGRESS.inc()
        try:
            refusal = self._refusal(scope, record)
            if refusal is None:
                await self._app(scope, receive, send_labelled)
            else:
                record.error_code = refusal.code
                await error_response(refusal)(scope, receive, send_labelled)
        finally:
            self._guard.drain.num_in_flight -= 1
            metrics.HTTP_IN_PROGRESS.dec()
            self._account(scope["path"], record)

    def _refusal(self, scope: Scope, record: RequestContext) -> APIError | None:
        headers = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            return APIError(431, "The request's headers are too large.", code="headers_too_large")
        if self._guard.drain.is_draining:
            record.headers["connection"] = "close"
            return shutting_down()
        if "\n" in scope["path"]:
            # Starlette's patterns stop at line breaks: no route of ours would take it, and BentoML would answer
            return unknown_url(scope["method"], scope["path"])
        if not self._guard.keys.are_required:
            return None
        authorization = header(scope, b"authorization")
        if self._is_public(scope["path"]) and authorization is None:
            return None
        try:
            record.key_name = record.client = self._guard.keys.name_of(authorization)
        except APIError as refusal:
            return refusal
        return None

    def _is_public(self, path: str) -> bool:
        if path == CHAT_PAGE or path.startswith(PAGE_FILES):
            return True
        if path == METRICS_PATH:
            return self._guard.metrics_are_public
        return self._guard.documents_are_public and (path == "/" or path.startswith(DOCUMENTS))

    def _account(self, path: str, record: RequestContext) -> None:
        seconds = time.monotonic() - record.begun
        if record.is_aborted or not record.status:
            record.is_aborted = True
            metrics.ABORTED.inc()
        status = str(record.status or CLIENT_LEFT)
        if record.status >= 400 or record.error_code:
            metrics.ERRORS.labels(record.error_code or f"http_{status}").inc()
        endpoint = self._guard.route_names.of(path)
        metrics.HTTP_REQUESTS.labels(endpoint, status).inc()
        metrics.HTTP_SECONDS.labels(endpoint, status).observe(seconds)
        if self._guard.finished is not None and path != METRICS_PATH:
            self._guard.finished(record, seconds)
