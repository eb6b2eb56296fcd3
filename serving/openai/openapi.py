"""The operations of the API, with the types that their handlers use -> the published OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from types import GenericAlias
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from serving import __version__
from serving.http.errors import MessagesErrorResponse
from serving.openai.common import Operation, RequestBody, StreamOptions
from serving.openai.router import OPERATIONS

PREFIX = "/v1"
VERSION = "3.1.0"  # the schemas are JSON Schema of 2020, which 3.0 is not
TAGS = (
    {"name": "OpenAI", "description": "OpenAI's API, and what other servers added to it."},
    {"name": "Anthropic", "description": "Anthropic's Messages API."},
)
REF = "#/components/schemas/{model}"
FAILURES = tuple(dict.fromkeys(operation.failure for operation in OPERATIONS))
DESCRIPTION = "ChatGLM2 and its relatives behind OpenAI's API. Every path under `/v1` also works without that prefix."


def paths(prefix: str) -> dict[str, dict[str, Any]]:
    """Path items by path."""
    items: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        items.setdefault(prefix + operation.path, {})[operation.method] = _operation(operation)
    return items


def components() -> dict[str, dict[str, Any]]:
    """Every schema that the paths refer to, and the shapes of failures."""
    bodies: list[type[RequestBody]] = [StreamOptions, *(o.request for o in OPERATIONS if o.request)]
    answers = [kind for operation in OPERATIONS for kind in (operation.answer, operation.event) if kind]
    all_types: Any = GenericAlias(tuple, (*bodies, *answers, *FAILURES))
    exact = ConfigDict(extra="forbid")  # objects in answers have no other keys than the described
    schemas: dict[str, Any] = TypeAdapter[Any](all_types, config=exact).json_schema(ref_template=REF)["$defs"]
    for kind in bodies:
        _allow_null(schemas[kind.__name__], kind.refused)
    failures = {
        kind.__name__: {
            "description": "A failure",
            "headers": {"x-request-id": {"schema": {"type": "string"}}},
            "content": {"application/json": {"schema": _reference(kind)}},
        }
        for kind in FAILURES
    }
    key = {"type": "http", "scheme": "bearer", "description": "Any key, unless the server was given keys"}
    return {"schemas": schemas, "responses": failures, "securitySchemes": {"key": key}}


def document(prefix: str = PREFIX) -> dict[str, Any]:
    """The whole description of the API, without BentoML's own routes."""
    return {
        "openapi": VERSION,
        "info": {
            "title": "chatglm2",
            "version": __version__,
            "license": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        },
        "tags": list(TAGS),
        "paths": paths(prefix),
        "components": components(),
    }


def _operation(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _reference(operation.answer)}}
    failure = {"$ref": f"#/components/responses/{operation.failure.__name__}"}
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": str(operation.handler.__doc__).rstrip("."),
        "tags": [TAGS[operation.failure is MessagesErrorResponse]["name"]],
        "security": [{}, {"key": []}],
        "responses": {
            "200": {"description": "The answer", "content": content},
            "4XX": failure,
            "5XX": failure,
        },
    }
    if operation.event is not None:
        content["text/event-stream"] = {"schema": _server_sent(operation.event)}
        name = operation.event.__name__
        described["description"] = f"With `stream: true`, every event of the stream is a `{name}`."
    if "{model}" in operation.path:
        described["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    if operation.request is not None:
        body = {"application/json": {"schema": _reference(operation.request)}}
        described["requestBody"] = {"required": True, "content": body}
    return described


def _reference(kind: Any) -> dict[str, str]:
    return {"$ref": REF.format(model=kind.__name__)}


def _server_sent(event: Any) -> dict[str, Any]:
    """One event of a stream: its data is JSON text, or `[DONE]` at the end."""
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": _reference(event)}
    data = {"anyOf": [{"const": "[DONE]"}, text]}
    return {"type": "object", "required": ["data"], "properties": {"data": data, "event": {"type": "string"}}}


def _allow_null(schema: dict[str, Any], refused: Mapping[str, str]) -> None:
    """In bodies of requests null is the same as leaving an optional field out; refused fields can only be null
    or empty."""
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        if name in required or {"type": "null"} in field.get("anyOf", ()):
            continue
        labels = {key: field.pop(key) for key in ("default", "title", "description") if key in field}
        schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **labels}
    for name, reason in refused.items():
        schema["properties"][name] = {"enum": [None, ""], "description": reason}
