"""POST /embeddings: texts or token ids -> vectors."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from serving.generation import embedding
from serving.generation.pipeline import ContextOverflow
from serving.http.errors import invalid
from serving.openai.common import Api, Count, ModelName, Operation, RequestBody, large_json_response
from serving.openai.completions.request import Prompts, to_prompts
from serving.openai.errors import context_overflow
from serving.openai.streaming import unless_disconnected

MAX_INPUTS = 2048  # OpenAI's

ACCEPTED_WITHOUT_EFFECT = {"user": "an end user's identifier; no rule depends on it"}


class EmbeddingRequest(RequestBody):
    """One text or many, as strings or as token ids."""

    model: ModelName
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

    user: str | None = None

    @model_validator(mode="after")
    def _not_too_many(self) -> EmbeddingRequest:
        if isinstance(self.input, list) and isinstance(self.input[0], str | list) and len(self.input) > MAX_INPUTS:
            raise invalid(f"At most {MAX_INPUTS} inputs are allowed in one request.", "input")
        return self


class Embedding(TypedDict):
    """One input's vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: Count
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Tokens of all inputs together."""

    prompt_tokens: Count
    total_tokens: Count


class EmbeddingList(TypedDict):
    """The vectors, in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


async def create(api: Api, request: Request) -> Response:
    """Texts to vectors."""
    body = await api.parse(request, EmbeddingRequest)
    model = api.running_model(body.model)
    _check_dimensions(body.dimensions, model.engine.shape.hidden_size)
    with api.generations.admit(request, model, 1) as admitted:
        try:
            texts = await asyncio.to_thread(embedding.tokenize, model, to_prompts(body.input))
        except ContextOverflow as error:
            raise context_overflow(error, is_default=True, param=error.param) from None
        num_tokens = sum(len(text.token_ids) for text in texts)
        async with admitted.embedding(num_tokens):
            vectors = await unless_disconnected(request.receive, embedding.embed(model, texts))
    num_numbers = sum(map(len, vectors))
    return await large_json_response(lambda: to_embedding_list(vectors, body, num_tokens), num_numbers)


def _check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    """Raises APIError 400 for any other width than the model's own: a part of its vectors means nothing by itself."""
    if dimensions not in (None, hidden_size):
        raise invalid(
            f"This model's embeddings have {hidden_size} dimensions and were not trained to be shortened; "
            f"leave 'dimensions' out or send {hidden_size}.",
            "dimensions",
            "unsupported_value",
        )


def to_embedding_list(
    vectors: Sequence[Sequence[float]], body: EmbeddingRequest, num_prompt_tokens: int
) -> EmbeddingList:
    encode = to_base64 if body.encoding_format == "base64" else list[float]
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)
        ],
        "model": body.model,
        "usage": {"prompt_tokens": num_prompt_tokens, "total_tokens": num_prompt_tokens},
    }


def to_base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's clients decode it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


OPERATIONS = (Operation("post", "/embeddings", "createEmbedding", create, EmbeddingList, EmbeddingRequest),)
