"""POST /embeddings: texts or token ids -> vectors."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from serving.engine.interface import EncoderInput
from serving.generation import embedding, encoder
from serving.generation.encoder import RunningEncoder
from serving.generation.pipeline import ContextOverflow, RunningModel
from serving.http.errors import invalid
from serving.openai.common import Api, Count, ModelName, Operation, RequestBody, large_json_response
from serving.openai.completions.request import Prompts, to_prompts
from serving.openai.errors import context_overflow
from serving.openai.streaming import unless_disconnected

MAX_INPUTS = 2048  # OpenAI's

Truncation = Annotated[int, Field(ge=-1, lt=2**31)]  # tokens to keep of a longer input; -1: what the model has room for

ACCEPTED_WITHOUT_EFFECT = {"user": "an end user's identifier; no rule depends on it"}


class EmbeddingRequest(RequestBody):
    """One text or many, as strings or as token ids. The last three fields are for embedding models only."""

    model: ModelName
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

    user: str | None = None

    input_type: Literal["query", "document", "passage", "search_query", "search_document"] | None = None
    prompt_name: str | None = None  # of sentence-transformers: one of the model's own prompts
    truncate_prompt_tokens: Truncation | None = None

    @model_validator(mode="after")
    def _not_too_many(self) -> EmbeddingRequest:
        if isinstance(self.input, list) and isinstance(self.input[0], str | list) and len(self.input) > MAX_INPUTS:
            raise invalid(f"At most {MAX_INPUTS} inputs are allowed in one request.", "input")
        if self.input_type is not None and self.prompt_name is not None:
            raise invalid("Give either 'input_type' or 'prompt_name'.", "prompt_name")
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
    model = await api.generations.model(request, body.model, "embeddings")
    if isinstance(model, RunningEncoder):
        vectors, num_tokens = await _encode(api, request, body, model)
    else:
        vectors, num_tokens = await _average(api, request, body, model)
    num_numbers = sum(map(len, vectors))
    return await large_json_response(lambda: to_embedding_list(vectors, body, num_tokens), num_numbers)


async def _average(
    api: Api, request: Request, body: EmbeddingRequest, model: RunningModel
) -> tuple[list[list[float]], int]:
    """(vectors of a model that generates, number of tokens)"""
    for name in ("input_type", "prompt_name", "truncate_prompt_tokens"):
        if getattr(body, name) is not None:
            raise invalid(f"'{name}' is for embedding models, and `{model.name}` generates text.", name)
    _check_dimensions(body.dimensions, model.engine.shape.hidden_size, ())
    with api.generations.admit(request, model, 1) as admitted:
        try:
            texts = await asyncio.to_thread(embedding.tokenize, model, to_prompts(body.input))
        except ContextOverflow as error:
            raise context_overflow(error, is_default=True, param=error.param) from None
        num_tokens = sum(len(text.token_ids) for text in texts)
        async with admitted.encoding(num_tokens):
            return await unless_disconnected(request.receive, embedding.embed(model, texts)), num_tokens


async def _encode(
    api: Api, request: Request, body: EmbeddingRequest, model: RunningEncoder
) -> tuple[list[list[float]], int]:
    """(vectors of an embedding model, number of tokens)"""
    _check_dimensions(body.dimensions, model.width, model.dimensions)
    prompt = model.prompt_of(body.prompt_name, body.input_type)
    limit = max_tokens(body.truncate_prompt_tokens, model)

    def finish(vector: Sequence[float]) -> list[float]:
        # to be shortened before it gets its length
        return embedding.normalized(vector[: body.dimensions])

    return await encode_inputs(
        api, request, model, lambda: model.tokenize(to_prompts(body.input), prompt, limit), finish
    )


async def encode_inputs(
    api: Api,
    request: Request,
    model: RunningEncoder,
    tokenize: Callable[[], list[EncoderInput]],
    finish: Callable[[Sequence[float]], list[float]],
) -> tuple[list[list[float]], int]:
    """(what an encoder computes for each input, number of tokens), after admission. Raises APIError."""
    with api.generations.admit(request, model, 1) as admitted:
        try:
            inputs = await asyncio.to_thread(tokenize)
        except ContextOverflow as error:
            raise context_overflow(error, is_default=True, param=error.param) from None
        num_tokens = sum(len(each.token_ids) for each in inputs)
        async with admitted.encoding(num_tokens) as priority:
            encoding = encoder.encode(model, inputs, priority, finish)
            return await unless_disconnected(request.receive, encoding), num_tokens


def max_tokens(truncation: int | None, model: RunningEncoder) -> int | None:
    """Where inputs are cut: -1 is the model's own length; None cuts nothing."""
    return model.context_length if truncation == -1 else truncation


def _check_dimensions(dimensions: int | None, width: int, allowed: Collection[int]) -> None:
    """Raises APIError 400 for a width that the vectors were not trained to be shortened to: a part of other vectors
    means nothing by itself."""
    if dimensions is None or dimensions == width or dimensions in allowed:
        return
    if allowed:
        sizes = ", ".join(map(str, sorted({*allowed, width})))
        raise invalid(f"This model's embeddings have one of {sizes} dimensions.", "dimensions", "unsupported_value")
    raise invalid(
        f"This model's embeddings have {width} dimensions and were not trained to be shortened; "
        f"leave 'dimensions' out or send {width}.",
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
