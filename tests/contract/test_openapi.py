"""The served document describes every route, and what comes back is what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from serving.openai.openapi import OPERATIONS, PREFIX, document
from serving.openai.router import create_app
from tests.contract.tiny import NAME, USER, chunks, post, send

DOCUMENT = document()
CHAT: dict[str, Any] = {"model": NAME, "messages": USER, "max_tokens": 4, "seed": 5}
TEXT: dict[str, Any] = {"model": NAME, "prompt": "Hello", "max_tokens": 4}
LENGTHS = ("max_tokens", "max_output_tokens")
USAGE = {"include_usage": True, "continuous_usage_stats": True}


def check(value: Any, schema: str) -> None:
    """`value` is valid under one of the document's schemas."""
    validator(schema).validate(value)


@cache
def validator(schema: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(
        {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]}
    )


def references(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "$ref":
                yield value
            yield from references(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from references(value)


def test_every_route_is_in_the_document_and_nothing_else(app: Starlette) -> None:
    routes = {
        (method.lower(), route.path.replace(":path}", "}"))
        for route in app.routes
        if isinstance(route, Route) and route.methods
        for method in route.methods - {"HEAD"}
    }
    assert {(operation.method, operation.path) for operation in OPERATIONS} == routes
    for operation in OPERATIONS:
        assert operation.method in DOCUMENT["paths"][PREFIX + operation.path]


def test_every_reference_leads_somewhere_and_every_schema_is_one() -> None:
    for reference in set(references(DOCUMENT)):
        tree: Any = DOCUMENT
        for step in reference.removeprefix("#/").split("/"):
            tree = tree[step]
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    names = [item["operationId"] for path in DOCUMENT["paths"].values() for item in path.values()]
    assert len(names) == len(set(names))


def test_bentomls_document_has_its_own_routes_and_these() -> None:
    import bentoml

    from serving.worker.bentoml_adapter import BentoMLService

    @bentoml.service(service_class=BentoMLService)
    class Small:
        @bentoml.api
        def shout(self, text: str) -> str:
            return text.upper()

    told = json.loads(json.dumps(Small.openapi_spec.asdict()))
    assert told["openapi"].startswith("3.1")
    assert {"/shout", "/readyz", "/v1/chat/completions", "/v1/responses"} <= told["paths"].keys()
    assert "/chat/completions" not in told["paths"]  # nothing twice
    assert next(iter(told["paths"])) == "/v1/chat/completions"
    assert [tag["name"] for tag in told["tags"]][:2] == ["OpenAI", "Anthropic"]
    assert "BentoML" not in json.dumps(told["info"])
    assert told["paths"]["/v1/embeddings"] == DOCUMENT["paths"]["/v1/embeddings"]
    assert {"ChatCompletion", "InvalidArgument"} <= told["components"]["schemas"].keys()


@pytest.mark.parametrize("change", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"stop": "o"}])
def test_chat_answers_and_chunks_are_what_the_document_says(app: Starlette, change: dict[str, Any]) -> None:
    check({**CHAT, **change}, "ChatRequest")
    check(post(app, "/chat/completions", {**CHAT, **change}).json(), "ChatCompletion")
    for options in (None, {"include_usage": True}, USAGE):
        body = {**CHAT, **change, "stream": True, "stream_options": options}
        check(body, "ChatRequest")
        for chunk in chunks(post(app, "/chat/completions", body)):
            check(chunk, "ChatCompletionChunk")


@pytest.mark.parametrize("change", [{}, {"n": 2, "best_of": 3}, {"logprobs": 2}, {"echo": True}, {"prompt": [[5, 6]]}])
def test_completions_are_what_the_document_says(app: Starlette, change: dict[str, Any]) -> None:
    check({**TEXT, **change}, "CompletionRequest")
    check(post(app, "/completions", {**TEXT, **change}).json(), "Completion")
    if "best_of" not in change:
        body = {**TEXT, **change, "stream": True, "stream_options": {"include_usage": True}}
        for chunk in chunks(post(app, "/completions", body)):
            check(chunk, "Completion")


@pytest.mark.parametrize("change", [{}, {"include": ["message.output_text.logprobs"], "instructions": "be"}])
def test_responses_and_their_events_are_what_the_document_says(app: Starlette, change: dict[str, Any]) -> None:
    body = {"model": NAME, "input": "hi", "max_output_tokens": 4, **change}
    check(body, "ResponsesRequest")
    check(post(app, "/responses", body).json(), "Response")
    for block in post(app, "/responses", {**body, "stream": True}).text.strip().split("\n\n"):
        check(json.loads(block.split("\ndata: ")[1]), "ResponseEvent")


def test_everything_else_is_what_the_document_says(app: Starlette) -> None:
    for encoding in ("float", "base64"):
        body = {"model": NAME, "input": ["a", "b"], "encoding_format": encoding}
        check(post(app, "/embeddings", body).json(), "EmbeddingList")
    check(send(app, "GET", "/models").json(), "ModelList")
    check(send(app, "GET", f"/models/{NAME}").json(), "Model")
    check(post(app, "/chat/completions/input_tokens", CHAT).json(), "InputTokens")
    check(post(app, "/responses/input_tokens", {"model": NAME, "input": "a"}).json(), "InputTokens")
    check(post(app, "/tokenize", {"model": NAME, "prompt": "a", "return_token_strs": True}).json(), "Tokens")
    check(post(app, "/detokenize", {"model": NAME, "tokens": [5]}).json(), "DetokenizedText")
    for response in (post(app, "/chat/completions", {}), send(app, "GET", "/nowhere"), send(app, "PUT", "/models")):
        check(response.json(), "ErrorResponse")


def test_a_schema_can_say_no() -> None:
    with pytest.raises(jsonschema.ValidationError):
        check({"object": "list", "data": []}, "ModelList")
    with pytest.raises(jsonschema.ValidationError):
        check({**CHAT, "temperature": 3}, "ChatRequest")


async def _document(request: Request) -> JSONResponse:
    return JSONResponse(document(""))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_schemathesis_finds_no_answer_that_the_document_does_not_have(app: Starlette, operation: Any) -> None:
    """Requests made from the document itself, right ones and wrong ones."""
    described = create_app(app.state.registry, more_routes=[Route("/docs.json", _document)])
    schema = schemathesis.openapi.from_asgi("/docs.json", described)
    requests = schema[operation.path][operation.method.upper()].as_strategy()

    seen_before = operation.path.endswith("input_tokens")  # the same request as another operation's

    @settings(
        max_examples=4 if seen_before else 12,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(requests)
    def answers(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body |= {"model": NAME, **{name: 2 for name in LENGTHS if name in operation.request.model_fields}}
        case.call_and_validate(
            checks=[
                checks.not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
            ]
        )

    answers()
