"""ASGI middleware around the whole server: checks headers and API keys, refuses during shutdown, counts and reports.

It reads paths and headers, never bodies. Health checks always pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving import metrics
from serving.http.api_keys import APIKeys
from serving.http.error_middleware import CLIENT_LEFT
from serving.http.errors import APIError, error_response, overloaded, shutting_down, unknown_url
from serving.http.request_context import RequestContext, header, label_response, request_context

READY_PATHS = ("/health", "/ping")  # as vLLM and SageMaker name them
HEALTH_PATHS = frozenset({"/livez", "/readyz", "/healthz", *READY_PATHS})
METRICS_PATH = "/metrics"
BENTOML_PATHS = ("/", "/generate", "/docs.json", "/schema.json")
DOCUMENTS = ("/docs", "/docs.json", "/schema.json", "/openapi.json", "/v1/docs", "/v1/openapi.json", "/static_content/")
CHAT_PAGE, PAGE_FILES = "/chat", "/page/"  # always public: they contain no secret, and the page asks for the key itself
MAX_HEADER_BYTES, MAX_HEADERS = 32 * 1024, 100


@dataclass
class ServerState:
    """What this middleware and the graceful shutdown share. For one event loop."""

    num_in_flight: int = 0  # requests, without health checks
    is_draining: bool = False  # new requests get 503


class RouteNames:
    """Path -> name of its route, for metrics' labels: a small, fixed set whatever paths clients send."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        paths = [route.path for route in routes if isinstance(route, Route) and not route.path.startswith("/{")]
        patterns = [prefix + path for path in paths for prefix in ("", "/v1")]
        heads = [pattern.split("{")[0] for pattern in patterns if "{" in pattern]
        self._heads = (*heads, "/static_content/")
        self._exact = frozenset((*(pattern for pattern in patterns if "{" not in pattern), *BENTOML_PATHS))

    def of(self, path: str) -> str:
        if path in self._exact:
            return path
        return next((head + "..." for head in self._heads if path.startswith(head)), "unknown")


@dataclass(frozen=True)
class AccessPolicy:
    """Which requests pass, and who receives the finished ones."""

    keys: APIKeys | None  # None: no API key is required
    state: ServerState
    metrics_are_public: bool = False
    documents_are_public: bool = False
    max_in_flight: int = 4096  # requests at once, of which admission lets far fewer generate
    observers: tuple[Callable[[RequestContext, float], None], ...] = ()  # called with each request and its seconds


class AccessMiddleware:
    """Outside of BentoML's routes and ours; inside of CORS, so that browsers' preflight requests need no key."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy, route_names: RouteNames) -> None:
        self._app = app
        self._policy = policy
        self._route_names = route_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in HEALTH_PATHS:
            await self._app(scope, receive, send)
            return
        context = request_context(scope)
        send = label_response(context, send)
        self._policy.state.num_in_flight += 1
        metrics.HTTP_IN_PROGRESS.inc()
        try:
            refusal = self._refusal(scope, context)
            if refusal is None:
                await self._app(scope, receive, send)
            else:
                context.error_code = refusal.code
                await error_response(refusal, scope["path"])(scope, receive, send)
        finally:
            self._policy.state.num_in_flight -= 1
            metrics.HTTP_IN_PROGRESS.dec()
            self._report(context)

    def _refusal(self, scope: Scope, context: RequestContext) -> APIError | None:
        """The error that this request gets instead of an answer; None if it passes."""
        headers = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            return APIError(431, "The request's headers are too large.", code="headers_too_large")
        if self._policy.state.is_draining and scope["path"] != METRICS_PATH:  # the end of a drain is worth seeing
            context.headers["connection"] = "close"
            return shutting_down()
        if self._policy.state.num_in_flight > self._policy.max_in_flight:
            return overloaded()
        if "\n" in scope["path"]:
            # Starlette's patterns stop at line breaks: no route of ours would match, and BentoML would answer
            return unknown_url(scope["method"], scope["path"])
        if self._policy.keys is None:
            return None
        authorization = header(scope, b"authorization")
        if authorization is None and (key := header(scope, b"x-api-key")):
            authorization = f"Bearer {key}"  # what Anthropic's clients send
        if authorization is None and self._is_public(scope["path"]):
            return None
        try:
            accepted = self._policy.keys.find(authorization)
            context.key_name = context.client = accepted.name
            context.is_administrator = accepted.is_administrator
        except APIError as refusal:
            return refusal
        return None

    def _is_public(self, path: str) -> bool:
        if path == CHAT_PAGE or path.startswith(PAGE_FILES):
            return True
        if path == METRICS_PATH:
            return self._policy.metrics_are_public
        return self._policy.documents_are_public and (path == "/" or path.startswith(DOCUMENTS))

    def _report(self, context: RequestContext) -> None:
        """Count a finished request and hand it to the observers."""
        seconds = time.monotonic() - context.begun
        if context.is_aborted or not context.status:
            context.is_aborted = True
            metrics.ABORTED.inc()
        status = str(context.status or CLIENT_LEFT)
        if context.status >= 400 or context.error_code:
            metrics.ERRORS.labels(context.error_code or f"http_{status}").inc()
        endpoint = self._route_names.of(context.path)
        metrics.HTTP_REQUESTS.labels(endpoint, status).inc()
        metrics.HTTP_SECONDS.labels(endpoint, status).observe(seconds)
        if context.path != METRICS_PATH:
            for observe in self._policy.observers:
                observe(context, seconds)
