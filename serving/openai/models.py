"""GET /models: the registry -> its model names, in OpenAI's shape; POST /models/{model}/load and /unload."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from serving.http.errors import APIError
from serving.http.request_context import request_context
from serving.openai import errors
from serving.openai.common import Api, Count, Operation, json_response
from serving.openai.streaming import unless_disconnected
from serving.registry import ServedModel

LOAD_SECONDS = 1800.0  # that a request to load a model waits


class Model(TypedDict):
    """One name that a served model answers to. `max_model_len` is null until the model was loaded once."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    root: str  # the model's own name
    state: Literal["available", "loading", "loaded", "failed"]
    abilities: list[Literal["chat", "embeddings", "rerank"]]
    family: str
    precision: str
    max_model_len: Count | None
    memory_bytes: Count  # of weights and caches; an estimate until it is loaded


class ModelList(TypedDict):
    """All names, the default model's own first."""

    object: Literal["list"]
    data: Annotated[list[Model], Field(min_length=1)]


async def list_models(api: Api, request: Request) -> Response:
    """The names of the served models."""
    found = [_model(name, served) for name in api.registry.names if (served := api.registry.find(name))]
    models: ModelList = {"object": "list", "data": found}
    return json_response(models)


async def retrieve_model(api: Api, request: Request) -> Response:
    """One name of a served model."""
    name, served = _named(api, request)
    return json_response(_model(name, served))


async def load_model(api: Api, request: Request) -> Response:
    """Load a model into memory, and answer when it is there. For administrators."""
    _check_administrator(request)
    name, served = _named(api, request)
    if api.registry.load is None:
        raise _fixed()
    await unless_disconnected(request.receive, api.registry.load_until(served, LOAD_SECONDS))
    if served.running is None:
        is_failed = served.error is not None
        raise errors.model_load_failed(served.name) if is_failed else errors.model_loading(served.name)
    return json_response(_model(name, served))


async def unload_model(api: Api, request: Request) -> Response:
    """Remove a model from memory. For administrators."""
    _check_administrator(request)
    name, served = _named(api, request)
    if api.registry.unload is None:
        raise _fixed()
    await api.registry.unload(served)
    return json_response(_model(name, served))


def _named(api: Api, request: Request) -> tuple[str, ServedModel]:
    name: str = request.path_params["model"]
    served = api.registry.find(name)
    if served is None:
        raise errors.model_not_found(name, api.registry.names)
    return name, served


def _fixed() -> APIError:
    return APIError(400, "This server keeps its only model in memory.", param="model", code="unsupported_model")


def _check_administrator(request: Request) -> None:
    """Raises APIError 403 for an API key that is not an administrator's; a server without keys has no roles."""
    context = request_context(request.scope)
    if context.key_name is not None and not context.is_administrator:
        message = "This API key may not load or unload models: it needs the role `admin` in the server's key list."
        raise APIError(403, message, code="insufficient_permissions")


def _model(name: str, served: ServedModel) -> Model:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "library",
        "root": served.name,
        "state": served.state,
        "abilities": sorted(served.abilities),
        "family": served.family,
        "precision": served.precision,
        "max_model_len": None if served.running is None else served.running.context_length,
        "memory_bytes": served.num_bytes,
    }


OPERATIONS = (
    Operation("get", "/models", "listModels", list_models, ModelList),
    Operation("post", "/models/{model}/load", "loadModel", load_model, Model),
    Operation("post", "/models/{model}/unload", "unloadModel", unload_model, Model),
    Operation("get", "/models/{model}", "retrieveModel", retrieve_model, Model),
)
