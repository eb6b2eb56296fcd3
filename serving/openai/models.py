"""GET /models: the registry -> its model names, in OpenAI's shape."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from serving.openai.common import Api, Count, Operation, json_response
from serving.openai.errors import model_not_found


class Model(TypedDict):
    """One name that the served model answers to."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str


class ModelList(TypedDict):
    """All its names, the true one first."""

    object: Literal["list"]
    data: Annotated[list[Model], Field(min_length=1)]


async def list_models(api: Api, request: Request) -> Response:
    """The names of the served model."""
    models: ModelList = {"object": "list", "data": [_model(api, name) for name in api.registry.names]}
    return json_response(models)


async def retrieve_model(api: Api, request: Request) -> Response:
    """One name of the served model."""
    name: str = request.path_params["model"]
    if not api.registry.serves(name):
        raise model_not_found(name)
    return json_response(_model(api, name))


def _model(api: Api, name: str) -> Model:
    return {"id": name, "object": "model", "created": api.registry.created, "owned_by": "library"}


OPERATIONS = (
    Operation("get", "/models", "listModels", list_models, ModelList),
    Operation("get", "/models/{model}", "retrieveModel", retrieve_model, Model),
)
