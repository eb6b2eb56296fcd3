"""The embeddings endpoint through the openai SDK and by hand."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types import CreateEmbeddingResponse
from starlette.applications import Starlette

from tests.contract.tiny import CONTEXT, NAME, assert_openai_error, post, sdk

WIDTH = 32  # of the tiny network


def vectors(app: Starlette, value: Any, **change: Any) -> list[list[float]]:
    response = post(app, "/embeddings", {"model": NAME, "input": value, **change})
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return [entry["embedding"] for entry in data]


def test_the_sdk_reads_vectors_which_it_asks_for_in_base64(app: Starlette) -> None:
    async def ask(client: AsyncOpenAI) -> CreateEmbeddingResponse:
        return await client.embeddings.create(model=NAME, input=["Hello", "world"])

    answer = sdk(app, ask)
    by_hand = vectors(app, ["Hello", "world"])
    for entry, expected in zip(answer.data, by_hand, strict=True):
        assert entry.embedding == pytest.approx(expected, abs=1e-7)
        assert len(entry.embedding) == WIDTH
        assert math.fsum(value * value for value in entry.embedding) == pytest.approx(1, abs=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 2


def test_a_text_has_the_same_vector_in_any_company_and_form(app: Starlette) -> None:
    (alone,) = vectors(app, "Hello world")
    many = vectors(app, [f"text {i}" for i in range(40)] + ["Hello world"])
    assert len(many) == 41
    assert many[40] == pytest.approx(alone, abs=1e-5)
    (encoded,) = vectors(app, "Hello world", encoding_format="base64")
    raw = base64.b64decode(str(encoded))
    assert struct.unpack(f"<{WIDTH}f", raw) == pytest.approx(alone, abs=1e-7)


def test_token_ids_are_embedded_as_they_are(app: Starlette) -> None:
    ids = post(app, "/tokenize", {"model": NAME, "prompt": "Hello"}).json()["tokens"]
    by_list = vectors(app, [ids, ids])
    assert by_list[0] == pytest.approx(vectors(app, ids)[0], abs=1e-5)
    # by text, the model's own prefix is read but is no part of the mean
    assert by_list[0] != pytest.approx(vectors(app, "Hello")[0], abs=1e-3)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"input": ""}, "input", "invalid_value"),
        ({"input": ["a", ""]}, "input[1]", "invalid_value"),
        ({"input": []}, "input", "empty_array"),
        ({"input": None}, "input", "invalid_type"),
        ({"input": [99_999]}, "input", "invalid_value"),
        ({"input": "hello " * 300}, "input", "context_length_exceeded"),
        ({"input": ["a"] * 2049}, "input", "invalid_value"),
        ({"dimensions": 16}, "dimensions", "unsupported_value"),
        ({"dimensions": 0}, "dimensions", "integer_below_min_value"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"temperature": 1}, "temperature", "unknown_parameter"),
        ({"model": "gpt-5"}, "model", "model_not_found"),
    ],
)
def test_a_bad_field_is_named(app: Starlette, change: dict[str, Any], param: str, code: str) -> None:
    error = assert_openai_error(post(app, "/embeddings", {"model": NAME, "input": "x", **change}))
    assert (error["param"], error["code"]) == (param, code)


def test_the_models_own_width_and_a_user_are_accepted(app: Starlette) -> None:
    assert vectors(app, "x", dimensions=WIDTH, user="u") == vectors(app, "x", dimensions=None)


def test_an_input_may_fill_the_whole_context(app: Starlette) -> None:
    assert len(vectors(app, [5] * CONTEXT)) == 1
