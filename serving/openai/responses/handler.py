"""POST /responses: a body -> prompt -> generation -> a whole response or a stream of its events."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response as HTTPResponse

from serving.openai.common import Api, InputTokens, Operation, build_prompt, count_tokens, large_json_response
from serving.openai.responses.event_types import ResponseEvent
from serving.openai.responses.events import ResponseStream, to_response
from serving.openai.responses.request import ResponsesRequest, to_chat_job
from serving.openai.responses.response import Response, unfinished_response
from serving.openai.streaming import begin_stream, collect


async def create(api: Api, request: Request) -> HTTPResponse:
    """Answer a conversation (stateless)."""
    body, job = await api.parse_job(request, ResponsesRequest, to_chat_job)
    model = await api.generations.chat_model(request, body.model, body.stream)
    chunks = ResponseStream(unfinished_response(body), body.shows_logprobs, model.chat_format.token_bytes)
    with api.generations.admit(request, model, 1) as admitted:
        events = admitted.open([await build_prompt(model, job, "input")])
    if body.stream:
        return await begin_stream(events, chunks, request, api.limits)
    collected = await collect(events, request)
    return await large_json_response(lambda: to_response(collected, chunks), len(collected))


async def count_input_tokens(api: Api, request: Request) -> HTTPResponse:
    """Count an input's tokens without answering it."""
    body, job = await api.parse_job(request, ResponsesRequest, to_chat_job)
    return await count_tokens(api, request, body.model, job.conversation, "input")


OPERATIONS = (
    Operation("post", "/responses", "createResponse", create, Response, ResponsesRequest, ResponseEvent),
    Operation(
        "post", "/responses/input_tokens", "countResponseTokens", count_input_tokens, InputTokens, ResponsesRequest
    ),
)
