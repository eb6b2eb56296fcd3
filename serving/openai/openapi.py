"""The API's own description: one operation a route, with the true types of requests and answers. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel, TypeAdapter

from serving.openai import response_types as answers
from serving.openai.chat.request import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    StreamOptions,
    TokenizeRequest,
)
from serving.openai.embeddings import EmbeddingRequest
from serving.openai.responses import response_types as responses_answers
from serving.openai.responses.request import ResponsesRequest

PREFIX = "/v1"
VERSION = "3.1.0"  # the schemas are JSON Schema of 2020, which 3.0 is not
REF = "#/components/schemas/{model}"
DESCRIPTION = "ChatGLM2 and its relatives behind OpenAI's API. Every path under `/v1` also works without that prefix."
NULL_MEANS_ABSENT = (
    *(ChatRequest, CompletionRequest, EmbeddingRequest, ResponsesRequest, TokenizeRequest, StreamOptions),
)


@dataclass(frozen=True)
class Operation:
    """One route. `event` is what a stream of it consists of."""

    method: str
    path: str
    name: str
    summary: str
    answer: type[BaseModel]
    request: type[BaseModel] | None = None
    event: str | None = None  # the name of a schema


OPERATIONS = (
    Operation(
        "post",
        "/chat/completions",
        "createChatCompletion",
        "Answer a conversation",
        answers.ChatCompletion,
        ChatRequest,
        "ChatCompletionChunk",
    ),
    Operation(
        "post",
        "/chat/completions/input_tokens",
        "countChatTokens",
        "Count a conversation's tokens without answering it",
        answers.InputTokens,
        ChatRequest,
    ),
    Operation(
        "post",
        "/completions",
        "createCompletion",
        "Continue raw prompts",
        answers.Completion,
        CompletionRequest,
        "Completion",
    ),
    Operation(
        "post",
        "/responses",
        "createResponse",
        "Answer a conversation (stateless)",
        responses_answers.Response,
        ResponsesRequest,
        "ResponseEvent",
    ),
    Operation(
        "post",
        "/responses/input_tokens",
        "countResponseTokens",
        "Count an input's tokens without answering it",
        answers.InputTokens,
        ResponsesRequest,
    ),
    Operation("post", "/embeddings", "createEmbedding", "Texts to vectors", answers.EmbeddingList, EmbeddingRequest),
    Operation("get", "/models", "listModels", "The names of the served model", answers.ModelList),
    Operation("get", "/models/{model}", "retrieveModel", "One name of the served model", answers.Model),
    Operation("post", "/tokenize", "tokenize", "Text or messages to token ids", answers.Tokens, TokenizeRequest),
    Operation("post", "/detokenize", "detokenize", "Token ids to text", answers.DetokenizedText, DetokenizeRequest),
)


def paths(prefix: str) -> dict[str, dict[str, Any]]:
    """Path items by path; without a prefix they are called aliases, which is what they are."""
    items: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        items.setdefault(prefix + operation.path, {})[operation.method] = _operation(operation, prefix)
    return items


def components() -> dict[str, dict[str, Any]]:
    """Every schema that the paths refer to, and the one shape of failures."""
    schemas: dict[str, Any] = {}
    types: Sequence[Any] = [
        *(operation.request for operation in OPERATIONS if operation.request),
        *(operation.answer for operation in OPERATIONS),
        *(answers.ChatCompletionChunk, answers.ErrorResponse),
    ]
    for kind in types:
        schema = cast("type[BaseModel]", kind).model_json_schema(ref_template=REF)
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
    events = TypeAdapter[Any](responses_answers.ResponseEvent).json_schema(ref_template=REF)
    schemas |= events.pop("$defs")
    schemas["ResponseEvent"] = {"title": "ResponseEvent", **events}
    for kind in NULL_MEANS_ABSENT:
        _allow_null(schemas[kind.__name__])
    failure = {
        "description": "A failure, in OpenAI's shape",
        "headers": {"x-request-id": {"schema": {"type": "string"}}},
        "content": {"application/json": {"schema": {"$ref": REF.format(model="ErrorResponse")}}},
    }
    key = {"type": "http", "scheme": "bearer", "description": "Any key, unless the server was given keys"}
    return {"schemas": schemas, "responses": {"Failure": failure}, "securitySchemes": {"key": key}}


def document(prefixes: Sequence[str] = (PREFIX,)) -> dict[str, Any]:
    """The whole description of the API, without BentoML's own routes."""
    return {
        "openapi": VERSION,
        "info": {"title": "chatglm2", "version": "1"},
        "paths": {path: item for prefix in prefixes for path, item in paths(prefix).items()},
        "components": components(),
    }


def _operation(operation: Operation, prefix: str) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": REF.format(model=operation.answer.__name__)}}}
    if operation.event is not None:
        content["text/event-stream"] = {"schema": _server_sent(operation.event)}
    told: dict[str, Any] = {
        "operationId": operation.name if prefix else f"{operation.name}Alias",
        "summary": operation.summary,
        "tags": ["OpenAI" if prefix else "OpenAI, without prefix"],
        "security": [{}, {"key": []}],
        "responses": {
            "200": {"description": "The answer", "content": content},
            "4XX": {"$ref": "#/components/responses/Failure"},
            "5XX": {"$ref": "#/components/responses/Failure"},
        },
    }
    if operation.event is not None:
        told["description"] = f"With `stream: true`, every event of the stream is a `{operation.event}`."
    if "{model}" in operation.path:
        told["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    if operation.request is not None:
        schema = {"$ref": REF.format(model=operation.request.__name__)}
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return told


def _server_sent(event: str) -> dict[str, Any]:
    """One event of a stream: its data is JSON text, or `[DONE]` at the end."""
    told = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": REF.format(model=event)},
    }
    data = {"anyOf": [{"const": "[DONE]"}, told]}
    return {"type": "object", "required": ["data"], "properties": {"data": data, "event": {"type": "string"}}}


def _allow_null(schema: dict[str, Any]) -> None:
    """In these requests null is the same as leaving an optional field out."""
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        if name in required or {"type": "null"} in field.get("anyOf", ()):
            continue
        labels = {key: field.pop(key) for key in ("default", "title", "description") if key in field}
        schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **labels}
