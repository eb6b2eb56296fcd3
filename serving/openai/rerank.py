"""POST /rerank and /score: a query and documents -> how relevant each document is, by a cross-encoder."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Discriminator, Field, Tag, model_validator
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from serving.generation.encoder import RunningEncoder, to_score
from serving.http.errors import invalid
from serving.openai.common import STRING_OR_ARRAY, Api, Count, ModelName, Operation, RequestBody, large_json_response
from serving.openai.embeddings import Truncation, encode_inputs, max_tokens

MAX_DOCUMENTS = 2048

ACCEPTED_WITHOUT_EFFECT = {"user": "an end user's identifier; no rule depends on it"}


def _text_or_object(value: Any) -> str | None:
    if isinstance(value, str):
        return "<string>"
    return "<object>" if isinstance(value, dict) else None


class TextDocument(RequestBody, extra="allow"):
    """A document with a text, and with whatever else the client wants to get back with it."""

    text: str


Document = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[TextDocument, Tag("<object>")],
    Discriminator(
        _text_or_object, custom_error_type="string_or_object", custom_error_message="string or object with a text"
    ),
]
Texts = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("<array>")],
    STRING_OR_ARRAY,
]


class RerankRequest(RequestBody):
    """The shape of Jina and Cohere. `truncate_prompt_tokens` and `max_tokens_per_doc` allow long pairs to be cut."""

    model: ModelName
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[Document], Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True
    truncate_prompt_tokens: Truncation | None = None  # of query and document together
    max_tokens_per_doc: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    user: str | None = None


class RerankResult(TypedDict):
    """One document. `index`: which of the request's; `relevance_score`: 0 to 1."""

    index: Count
    relevance_score: float
    document: NotRequired[dict[str, Any]]


class ScoringUsage(TypedDict):
    """Tokens of all pairs together."""

    prompt_tokens: Count
    total_tokens: Count


class Reranking(TypedDict):
    """The documents, the most relevant first."""

    id: str
    object: Literal["list"]
    model: str
    results: list[RerankResult]
    usage: ScoringUsage


class ScoreRequest(RequestBody):
    """Pairs of texts: one with one, one with many, or equally many."""

    model: ModelName
    text_1: Texts
    text_2: Texts
    truncate_prompt_tokens: Truncation | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _they_pair(self) -> ScoreRequest:
        first, second = _as_list(self.text_1), _as_list(self.text_2)
        if len(second) > MAX_DOCUMENTS:
            raise invalid(f"At most {MAX_DOCUMENTS} texts are allowed in one request.", "text_2")
        if len(first) not in (1, len(second)):
            raise invalid("'text_1' must be one text, or as many as 'text_2'.", "text_1")
        return self


class Score(TypedDict):
    """How relevant the second text of one pair is to the first, 0 to 1."""

    object: Literal["score"]
    index: Count
    score: float


class ScoreList(TypedDict):
    """The scores, in the order of the pairs."""

    id: str
    object: Literal["list"]
    created: Count
    model: str
    data: list[Score]
    usage: ScoringUsage


async def rerank(api: Api, request: Request) -> Response:
    """Order documents by how relevant they are to a query."""
    body = await api.parse(request, RerankRequest)
    texts = [each if isinstance(each, str) else each.text for each in body.documents]
    pairs = [(body.query, text, f"documents[{index}]") for index, text in enumerate(texts)]
    truncation = body.truncate_prompt_tokens
    if body.max_tokens_per_doc is not None:
        truncation = -1
    scores, usage = await _scores(api, request, body.model, pairs, truncation, body.max_tokens_per_doc)

    def build() -> Reranking:
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
        results: list[RerankResult] = [{"index": index, "relevance_score": scores[index]} for index in order]
        if body.return_documents:
            for result in results:
                document = body.documents[result["index"]]
                result["document"] = {"text": document} if isinstance(document, str) else document.model_dump()
        name = f"rerank-{uuid.uuid4().hex}"
        return {"id": name, "object": "list", "model": body.model, "results": results, "usage": usage}

    return await large_json_response(build)


async def score(api: Api, request: Request) -> Response:
    """Score pairs of texts."""
    body = await api.parse(request, ScoreRequest)
    first, second = _as_list(body.text_1), _as_list(body.text_2)
    names = ["text_2" if isinstance(body.text_2, str) else f"text_2[{index}]" for index in range(len(second))]
    pairs = list(zip(first if len(first) > 1 else first * len(second), second, names, strict=True))
    scores, usage = await _scores(api, request, body.model, pairs, body.truncate_prompt_tokens)
    listed: list[Score] = [{"object": "score", "index": index, "score": each} for index, each in enumerate(scores)]
    answer: ScoreList = {
        "id": f"score-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model,
        "data": listed,
        "usage": usage,
    }
    return await large_json_response(lambda: answer, len(listed))


async def _scores(
    api: Api,
    request: Request,
    name: str,
    pairs: Sequence[tuple[str, str, str]],
    truncation: int | None,
    max_second: int | None = None,
) -> tuple[list[float], ScoringUsage]:
    model = await api.generations.model(request, name, "rerank")
    assert isinstance(model, RunningEncoder)
    limit = max_tokens(truncation, model)
    found, num_tokens = await encode_inputs(
        api, request, model, lambda: model.tokenize_pairs(pairs, limit, max_second), to_score
    )
    return [each[0] for each in found], {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _as_list(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


OPERATIONS = (
    Operation("post", "/rerank", "rerank", rerank, Reranking, RerankRequest),
    Operation("post", "/score", "createScore", score, ScoreList, ScoreRequest),
)
