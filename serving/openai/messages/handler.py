"""POST /messages: a body in Anthropic's shape -> a whole message or a stream; /count_tokens: -> a number."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from serving.http.errors import MessagesErrorResponse
from serving.openai.common import Api, Operation, build_prompt, json_response, large_json_response, num_input_tokens
from serving.openai.messages.request import CountMessagesTokensRequest, MessagesRequest, to_chat_job
from serving.openai.messages.response import (
    AnthropicMessage,
    InputTokenCount,
    MessageEvent,
    MessageStream,
    to_message,
    unfinished_message,
)
from serving.openai.responses.response import fresh_id
from serving.openai.streaming import begin_stream, collect


async def create(api: Api, request: Request) -> Response:
    """Answer a conversation in Anthropic's shape."""
    body, job = await api.parse_job(request, MessagesRequest, to_chat_job)
    model = await api.generations.chat_model(request, body.model, body.stream)
    with api.generations.admit(request, model, 1) as admitted:
        prompt = await build_prompt(model, job)
        events = admitted.open([prompt])
    fold = MessageStream(unfinished_message(fresh_id("msg"), body.model, len(prompt.token_ids)))
    if body.stream:
        return await begin_stream(events, fold, request, api.limits)
    collected = await collect(events, request)
    return await large_json_response(lambda: to_message(collected, fold), len(collected))


async def count_tokens(api: Api, request: Request) -> Response:
    """Count the tokens of a conversation in Anthropic's shape without answering it."""
    body, conversation = await api.parse_job(
        request, CountMessagesTokensRequest, CountMessagesTokensRequest.conversation
    )
    counted: InputTokenCount = {
        "input_tokens": await num_input_tokens(api, request, body.model, conversation, "messages")
    }
    return json_response(counted)


OPERATIONS = (
    Operation(
        "post", "/messages", "createMessage", create, AnthropicMessage, MessagesRequest, MessageEvent,
        MessagesErrorResponse,
    ),
    Operation(
        "post", "/messages/count_tokens", "countMessagesTokens", count_tokens, InputTokenCount,
        CountMessagesTokensRequest, None, MessagesErrorResponse,
    ),
)  # fmt: skip
