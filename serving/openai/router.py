"""The route table of the OpenAI API -> one Starlette application; unknown URLs and methods -> OpenAI's errors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from serving.admission.admission_control import Admission
from serving.http.error_middleware import ErrorMiddleware
from serving.http.errors import error_response, method_not_allowed, unknown_url
from serving.http.request_context import request_context
from serving.openai import embeddings, models, rerank, tokenize
from serving.openai.chat import handler as chat
from serving.openai.common import Api
from serving.openai.completions import handler as completions
from serving.openai.errors import from_exception
from serving.openai.limits import ApiLimits
from serving.openai.messages import handler as messages
from serving.openai.responses import handler as responses
from serving.openai.start_generation import GenerationStarter
from serving.openai.streaming import answer
from serving.registry import ModelRegistry

OPERATIONS = (
    *chat.OPERATIONS,
    *completions.OPERATIONS,
    *responses.OPERATIONS,
    *messages.OPERATIONS,
    *embeddings.OPERATIONS,
    *rerank.OPERATIONS,
    *models.OPERATIONS,
    *tokenize.OPERATIONS,
)


def create_app(
    registry: ModelRegistry,
    limits: ApiLimits | None = None,
    catch_all: bool = True,
    admission: Admission | None = None,
    more_routes: Sequence[Route] = (),
) -> Starlette:
    """The API without its prefix; `registry` may get its model later.

    catch_all: also answer unknown paths, in OpenAI's shape. False where other applications share the same root.
    admission: to be shared by all applications in front of one engine.
    """
    limits = limits or ApiLimits()
    api = Api(registry, limits, GenerationStarter(registry, admission or Admission(), limits))
    routes = [
        Route(
            operation.path.replace("{model}", "{model:path}"),
            partial(operation.handler, api) if operation.event is None else partial(answer, operation.handler, api),
            methods=[operation.method.upper()],
        )
        for operation in OPERATIONS
    ]
    routes += more_routes
    if catch_all:
        routes.append(Route("/{path:path}", _Unrouted(tuple(routes))))
    app = Starlette(
        routes=routes,
        middleware=[Middleware(ErrorMiddleware, to_api_error=from_exception)],
        exception_handlers={HTTPException: _http_exception},
    )
    app.router.redirect_slashes = False
    app.state.registry = registry
    return app


class _Unrouted:
    """Any method on any path that no other route took."""

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = Request(scope).url.path
        for route in self._routes:
            if route.matches(scope)[0] == Match.PARTIAL:
                allowed = ", ".join(sorted(route.methods or ()))
                raise method_not_allowed(scope["method"], path, allowed)
        raise unknown_url(scope["method"], path)


async def _http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in OpenAI's shape."""
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if "Allow" in headers:
        failure = method_not_allowed(request.method, request.url.path, headers["Allow"])
    else:
        failure = unknown_url(request.method, request.url.path)
    request_context(request.scope).error_code = failure.code
    return error_response(failure, request.url.path)
