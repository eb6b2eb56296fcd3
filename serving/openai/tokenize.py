"""POST /tokenize and /detokenize: text or messages -> token ids, and token ids -> text."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from serving.generation.interface import Conversation
from serving.generation.pipeline import RunningModel
from serving.http.errors import invalid
from serving.openai.chat.messages import ChatMessage
from serving.openai.chat.tools import MAX_TOOLS, ToolDefinition
from serving.openai.common import Api, Count, ModelName, Operation, RequestBody, TokenId, large_json_response


class TokenizeRequest(RequestBody):
    """POST /tokenize: either a raw `prompt` or `messages`; the ids are exactly what a completion would read."""

    model: ModelName
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    tools: list[ToolDefinition] = Field([], max_length=MAX_TOOLS)
    continue_final_message: bool = False
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("Give either 'prompt' or 'messages'.", "prompt")
        return self


class Tokens(TypedDict):
    """What a completion would read. `token_strs` on request only."""

    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: list[str] | None


class DetokenizeRequest(RequestBody):
    """POST /detokenize: the text of a run of ids; special tokens have none."""

    model: ModelName
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class DetokenizedText(TypedDict):
    """The text of a run of ids."""

    prompt: str


async def tokenize(api: Api, request: Request) -> Response:
    """Text or messages to token ids."""
    body = await api.parse(request, TokenizeRequest)
    model = await api.generations.chat_model(request, body.model)

    def build() -> Tokens:
        token_ids = _token_ids(model, body)
        token_bytes = model.chat_format.token_bytes
        texts = (token_bytes(token_id).decode("utf-8", "replace") for token_id in token_ids)
        return {
            "count": len(token_ids),
            "max_model_len": model.context_length,
            "tokens": token_ids,
            "token_strs": list(texts) if body.return_token_strs else None,
        }

    with api.generations.admit(request, model, 0):
        return await large_json_response(build)


def _token_ids(model: RunningModel, body: TokenizeRequest) -> list[int]:
    if body.messages is None:
        return model.encode(body.prompt or "", "prompt")
    messages = tuple(message.to_message(index) for index, message in enumerate(body.messages))
    tools = tuple(tool.tool for tool in body.tools)
    return model.render(Conversation(messages, tools, body.continue_final_message))


async def detokenize(api: Api, request: Request) -> Response:
    """Token ids to text."""
    body = await api.parse(request, DetokenizeRequest)
    model = await api.generations.chat_model(request, body.model)

    def build() -> DetokenizedText:
        for index, token_id in enumerate(body.tokens):
            if token_id >= model.num_tokens:
                raise invalid(f"This model has no token {token_id}.", f"tokens[{index}]")
        return {"prompt": model.chat_format.decode(body.tokens)}

    with api.generations.admit(request, model, 0):
        return await large_json_response(build, len(body.tokens))


OPERATIONS = (
    Operation("post", "/tokenize", "tokenize", tokenize, Tokens, TokenizeRequest),
    Operation("post", "/detokenize", "detokenize", detokenize, DetokenizedText, DetokenizeRequest),
)
