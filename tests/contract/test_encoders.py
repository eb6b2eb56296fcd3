"""Embedding models and rerankers through the API: their numbers are those of transformers alone, whatever the batch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import AsyncOpenAI

from models.family import ImportRefused
from models.store.model_store import import_model, servable
from models.store.progress import no_progress
from serving.settings import Settings
from serving.worker.model_source import ModelSource
from tests.contract.several import Several, several_models
from tests.contract.tiny import assert_openai_error
from tests.encoders import reference_score, reference_vector, write_encoder
from tests.own_store import own_store
from tests.sources import source_of

TEXTS = ["a b c", "w1", " ".join(f"w{i}" for i in range(50)), "x y z unknownword", "a [SEP] b"]
PROMPTS = {"query": "w1 w2 ", "document": "w3 "}
SETTINGS = Settings(device="cpu", threads=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("encoders")
    return {
        "bert": write_encoder(home / "bert", "bert", "cls_token"),
        "xlmr": write_encoder(home / "xlmr", "xlm-roberta", "mean_tokens", PROMPTS),
        "qwen": write_encoder(home / "qwen", "qwen3", "lasttoken"),
        "reranker": write_encoder(home / "reranker", "reranker"),
    }


@pytest.fixture(scope="module")
def sources(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    with own_store(tmp_path_factory.mktemp("store")):
        for name, folder in folders.items():
            options = {"dimensions": "16"} if name == "qwen" else {}
            import_model("reranker" if name == "reranker" else "embedding", folder, f"{name}:1", options, no_progress)
        return {name: source_of(servable(f"{name}:1"), SETTINGS) for name in folders}


def with_models(sources: dict[str, ModelSource], work: Callable[[Several], Awaitable[None]]) -> None:
    async def run() -> None:
        async with several_models(sources) as several:
            await work(several)

    asyncio.run(run())


async def embedded(several: Several, model: str, texts: list[str], **more: Any) -> list[list[float]]:
    body = {"model": model, "input": texts, **more}
    response = await several.http.post("/embeddings", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return [each["embedding"] for each in response.json()["data"]]


def close(ours: list[list[float]], expected: list[list[float]]) -> None:
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("name", "pooling"), [("bert", "cls_token"), ("xlmr", "mean_tokens"), ("qwen", "lasttoken")])
def test_vectors_are_those_of_transformers_alone(
    folders: dict[str, Path], sources: dict[str, ModelSource], name: str, pooling: str
) -> None:
    texts = [*TEXTS[:4], "a unk b"]  # a special token's name in a text is a word that the model does not know
    expected = [reference_vector(folders[name], text, pooling) for text in texts]

    async def work(several: Several) -> None:
        close(await embedded(several, name, TEXTS), expected)
        requests = [embedded(several, name, [text]) for text in TEXTS]
        close([vectors[0] for vectors in await asyncio.gather(*requests)], expected)

    with_models(sources, work)


def test_prompts_are_in_front_of_queries_and_documents(
    folders: dict[str, Path], sources: dict[str, ModelSource]
) -> None:
    query, document, plain = (
        reference_vector(folders["xlmr"], prompt + "a b", "mean_tokens") for prompt in ("w1 w2 ", "w3 ", "")
    )

    async def work(several: Several) -> None:
        close(await embedded(several, "xlmr", ["a b"], input_type="query"), [query])
        close(await embedded(several, "xlmr", ["a b"], input_type="search_document"), [document])
        close(await embedded(several, "xlmr", ["a b"], prompt_name="query"), [query])
        close(await embedded(several, "xlmr", ["a b"]), [plain])
        body = {"model": "xlmr", "input": "a", "prompt_name": "other"}
        error = assert_openai_error(await several.http.post("/embeddings", json=body), 400)
        assert (error["param"], "query, document" in error["message"]) == ("prompt_name", True)

    with_models(sources, work)


def test_vectors_are_shortened_where_the_model_was_trained_for_it(sources: dict[str, ModelSource]) -> None:
    async def work(several: Several) -> None:
        (whole,) = await embedded(several, "qwen", ["a b"])
        (part,) = await embedded(several, "qwen", ["a b"], dimensions=16)
        length = sum(value * value for value in whole[:16]) ** 0.5
        close([part], [[value / length for value in whole[:16]]])
        for name, dimensions in (("qwen", 17), ("bert", 16)):
            body = {"model": name, "input": "a", "dimensions": dimensions}
            assert assert_openai_error(await several.http.post("/embeddings", json=body), 400)["param"] == "dimensions"

    with_models(sources, work)


def test_too_long_a_text_is_refused_or_cut_as_the_client_says(
    folders: dict[str, Path], sources: dict[str, ModelSource]
) -> None:
    long = " ".join(f"w{i % 70}" for i in range(100))

    async def work(several: Several) -> None:
        response = await several.http.post("/embeddings", json={"model": "bert", "input": ["a", long]})
        error = assert_openai_error(response, 400)
        assert (error["param"], error["code"]) == ("input[1]", "context_length_exceeded")
        kept = " ".join(long.split()[:8])
        expected = reference_vector(folders["bert"], kept, "cls_token")
        close(await embedded(several, "bert", [long], truncate_prompt_tokens=10), [expected])
        assert len(await embedded(several, "bert", [long], truncate_prompt_tokens=-1)) == 1
        for value, param in (("", "input"), ([1, 5000], "input")):
            error = assert_openai_error(await several.http.post("/embeddings", json={"model": "bert", "input": value}))
            assert error["param"] == param

    with_models(sources, work)


def test_documents_are_ranked_as_the_cross_encoder_scores_them(
    folders: dict[str, Path], sources: dict[str, ModelSource]
) -> None:
    documents = ["a b", "c d e f", "w1 w2", "z"]
    expected = [reference_score(folders["reranker"], "w5 w6", text) for text in documents]
    order = sorted(range(4), key=lambda index: -expected[index])

    async def work(several: Several) -> None:
        objects = [{"text": text, "id": index} for index, text in enumerate(documents)]
        for given in (documents, objects):
            body: dict[str, Any] = {"model": "reranker", "query": "w5 w6", "documents": given, "top_n": 3}
            answer = (await several.http.post("/rerank", json=body, timeout=60)).json()
            assert [each["index"] for each in answer["results"]] == order[:3]
            scores = [each["relevance_score"] for each in answer["results"]]
            close([scores], [[expected[index] for index in order[:3]]])
            first = answer["results"][0]["document"]
            assert first == ({"text": documents[order[0]]} if given is documents else objects[order[0]])
            assert answer["usage"]["total_tokens"] == sum(3 + 2 + len(text.split()) for text in documents)
        bare = await several.http.post("/rerank", json={**body, "return_documents": False})
        assert "document" not in bare.json()["results"][0]
        pairs = {"model": "reranker", "text_1": "w5 w6", "text_2": documents}
        scored = (await several.http.post("/score", json=pairs)).json()["data"]
        close([[each["score"] for each in scored]], [expected])

    with_models(sources, work)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/chat/completions", {"model": "bert", "messages": [{"role": "user", "content": "a"}]}, "model"),
        ("/embeddings", {"model": "reranker", "input": "a"}, "model"),
        ("/rerank", {"model": "bert", "query": "a", "documents": ["b"]}, "model"),
        ("/rerank", {"model": "reranker", "query": "a", "documents": []}, "documents"),
        ("/rerank", {"model": "reranker", "query": "a", "documents": [{"title": "b"}]}, "documents[0].text"),
        ("/rerank", {"model": "reranker", "query": "a", "documents": ["b", 1]}, "documents[1]"),
        ("/rerank", {"model": "reranker", "query": "a", "documents": ["w1 " * 100]}, "documents[0]"),
        ("/score", {"model": "reranker", "text_1": ["a", "b"], "text_2": ["a"]}, "text_1"),
        ("/tokenize", {"model": "bert", "prompt": "a"}, "model"),
    ],
)
def test_bad_requests_name_the_field(
    sources: dict[str, ModelSource], path: str, body: dict[str, Any], param: str
) -> None:
    async def work(several: Several) -> None:
        assert assert_openai_error(await several.http.post(path, json=body, timeout=60), 400)["param"] == param

    with_models(sources, work)


def test_the_openai_sdk_gets_its_vectors(sources: dict[str, ModelSource]) -> None:
    async def work(several: Several) -> None:
        client = AsyncOpenAI(base_url="http://test", api_key="none", http_client=several.http, max_retries=0)
        found = await client.embeddings.create(model="bert", input=["a b", "c"])
        assert [len(each.embedding) for each in found.data] == [32, 32]
        close([found.data[0].embedding], [(await embedded(several, "bert", ["a b"]))[0]])

    with_models(sources, work)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("embedding", "reranker", "cross-encoder"),
        ("reranker", "bert", "family embedding"),
        ("hf", "bert", "family embedding"),
    ],
)
def test_a_folder_of_another_kind_is_refused(
    folders: dict[str, Path], tmp_path: Path, family: str, name: str, message: str
) -> None:
    with own_store(tmp_path), pytest.raises(ImportRefused, match=message):
        import_model(family, folders[name], "x:1", {}, no_progress)


def test_a_module_or_pooling_that_is_not_known_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "max", "bert", "max_tokens")
    with own_store(tmp_path / "store"), pytest.raises(ImportRefused, match="pooling_mode_max_tokens"):
        import_model("embedding", folder, "x:1", {}, no_progress)
