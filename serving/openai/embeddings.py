"""POST /embeddings: the request, field by field, and vectors -> OpenAI's JSON. Pure."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from serving.http.errors import invalid
from serving.openai.chat.messages import STRICT
from serving.openai.chat.request import ModelName, Prompts, without_nulls
from serving.openai.chat.structured_outputs import conflict

MAX_INPUTS = 2048  # OpenAI's

ACCEPTED_WITHOUT_EFFECT = {"user": "who asks; there are no per-user rules"}


class EmbeddingRequest(BaseModel):
    """One text or many, as strings or as token ids."""

    model_config = STRICT

    model: ModelName
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return without_nulls(cls, data)

    @model_validator(mode="after")
    def _not_too_many(self) -> EmbeddingRequest:
        if isinstance(self.input, list) and isinstance(self.input[0], str | list) and len(self.input) > MAX_INPUTS:
            raise conflict("input", f"At most {MAX_INPUTS} inputs are allowed in one request.")
        return self


def check_dimensions(body: EmbeddingRequest, hidden_size: int) -> None:
    """Raises APIError 400 for any other width than the model's own: a part of its vectors means nothing by itself."""
    if body.dimensions not in (None, hidden_size):
        raise invalid(
            f"This model's embeddings have {hidden_size} dimensions and were not trained to be shortened; "
            f"leave 'dimensions' out or send {hidden_size}.",
            "dimensions",
            "unsupported_value",
        )


def to_embedding_list(
    vectors: Sequence[Sequence[float]], body: EmbeddingRequest, num_prompt_tokens: int
) -> dict[str, Any]:
    """The whole answer, in the order of the inputs."""
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
