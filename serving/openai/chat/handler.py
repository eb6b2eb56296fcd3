"""POST /chat/completions: a body -> prompt -> generation -> a whole completion or a stream."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from serving.openai.chat.request import ChatRequest, to_chat_job
from serving.openai.chat.response import ChatCompletion, ChatCompletionChunk, ChatCompletionStream, to_completion
from serving.openai.common import (
    Api,
    InputTokens,
    Operation,
    build_prompt,
    chunk_options,
    count_tokens,
    large_json_response,
)
from serving.openai.streaming import begin_stream, collect
from serving.openai.validation import above_maximum


async def create(api: Api, request: Request) -> Response:
    """Answer a conversation."""
    body, job = await api.parse_job(request, ChatRequest, to_chat_job)
    model = await api.generations.chat_model(request, body.model, body.stream)
    if body.n > api.limits.max_n:
        raise above_maximum("n", api.limits.max_n, body.n)
    envelope = api.envelope("chatcmpl", body.model)
    options = chunk_options(body, body.logprobs, bool(body.functions), job.tool_use.name is not None)
    token_bytes = model.chat_format.token_bytes
    with api.generations.admit(request, model, body.n) as admitted:
        prompt = await build_prompt(model, job)
        events = admitted.open([prompt])
    if body.stream:
        chunks = ChatCompletionStream(envelope, options, token_bytes, len(prompt.token_ids))
        return await begin_stream(events, chunks, request, api.limits)
    collected = await collect(events, request)
    return await large_json_response(lambda: to_completion(collected, envelope, options, token_bytes), len(collected))


async def count_input_tokens(api: Api, request: Request) -> Response:
    """Count a conversation's tokens without answering it."""
    body, job = await api.parse_job(request, ChatRequest, to_chat_job)
    return await count_tokens(api, request, body.model, job.conversation, "messages")


OPERATIONS = (
    Operation(
        "post", "/chat/completions", "createChatCompletion", create, ChatCompletion, ChatRequest, ChatCompletionChunk
    ),
    Operation(
        "post", "/chat/completions/input_tokens", "countChatTokens", count_input_tokens, InputTokens, ChatRequest
    ),
)
