"""One `bentoml serve` with a chat model, an embedding model and a cross-encoder behind one address."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai import OpenAI

from models.store.model_store import import_model
from models.store.progress import no_progress
from tests.e2e.server import Server, serving
from tests.encoders import write_encoder
from tests.own_store import own_store

USER, ADMINISTRATOR = "of-a-user", "of-the-operator"
TEXTS = ["w1 w2 w3", "w10 w11 w12", "w20 w21", "w30 w31 w32 w33"]
NAMES = ["chatglm2-demo", "sentences", "ranker"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("several")
    with own_store(home):
        for kind, family, name in (("bert", "embedding", "sentences"), ("reranker", "reranker", "ranker")):
            import_model(family, write_encoder(home / kind, kind), f"{name}:1", {}, no_progress)
    settings = {
        "CHATGLM_MODELS": ",".join(NAMES),
        "CHATGLM_MEMORY_GIB": "1",
        "CHATGLM_API_KEYS": f"{USER} reader, {ADMINISTRATOR} operator admin",
    }
    with serving(home, settings) as running:
        yield running


def headers(key: str = USER) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def models(server: Server) -> dict[str, dict[str, Any]]:
    listed = requests.get(f"{server.base_url}/models", headers=headers(), timeout=10).json()["data"]
    return {model["id"]: model for model in listed}


def test_the_list_says_what_each_model_can_do_and_where_it_is(server: Server) -> None:
    found = models(server)
    assert {name: found[name]["abilities"] for name in NAMES} == {
        "chatglm2-demo": ["chat", "embeddings"],
        "sentences": ["embeddings"],
        "ranker": ["rerank"],
    }
    assert found["chatglm2-demo"]["state"] == "loaded"
    assert found["chatglm2-6b"]["root"] == "chatglm2-demo"


def test_retrieval_with_langchain_against_one_address(server: Server) -> None:
    where: dict[str, Any] = {"base_url": server.base_url, "api_key": USER}
    embeddings = OpenAIEmbeddings(model="sentences", check_embedding_ctx_length=False, **where)
    stored = InMemoryVectorStore.from_documents([Document(text) for text in TEXTS], embeddings)
    found = [document.page_content for document in stored.similarity_search("w10 w11 w12", k=3)]
    assert found[0] == "w10 w11 w12"
    ranked = requests.post(
        f"{server.base_url}/rerank",
        json={"model": "ranker", "query": "w10 w11", "documents": found, "top_n": 2},
        headers=headers(),
        timeout=60,
    ).json()["results"]
    assert len(ranked) == 2
    assert ranked[0]["relevance_score"] >= ranked[1]["relevance_score"]
    context = " ".join(found[each["index"]] for each in ranked)
    prompt = ChatPromptTemplate.from_messages([("user", "{context}\n{question}")])
    chain = prompt | ChatOpenAI(model="chatglm2-demo", max_tokens=8, **where)
    assert chain.invoke({"context": context, "question": "你好"}).response_metadata["finish_reason"]


@pytest.mark.parametrize(
    "body",
    [
        {"query": "w1", "documents": TEXTS},  # FastGPT
        {"query": "w1", "documents": TEXTS, "top_n": 2, "return_documents": True},  # Dify, Xinference, Jina
        {"query": "w1", "documents": TEXTS, "top_n": 2, "max_tokens_per_doc": 4096},  # Cohere
        {"query": "w1", "documents": [{"text": text} for text in TEXTS], "return_documents": False},  # LlamaIndex
    ],
)
@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_the_shapes_of_other_programs_are_ranked(server: Server, body: dict[str, Any], prefix: str) -> None:
    url = f"{server.url}{prefix}/rerank"
    reply = requests.post(url, json={"model": "ranker", **body}, headers=headers(), timeout=60)
    assert reply.status_code == 200, reply.text
    results = reply.json()["results"]
    assert len(results) == body.get("top_n", len(TEXTS))
    assert sorted(results, key=lambda each: -each["relevance_score"]) == results


def test_all_models_at_once_through_the_sdk(server: Server) -> None:
    client = OpenAI(base_url=server.base_url, api_key=USER, max_retries=0)

    def ask(number: int) -> str:
        name = [*NAMES, "chatglm2-6b"][number % 4]
        if name == "sentences":
            return str(len(client.embeddings.create(model=name, input=TEXTS).data))
        if name == "ranker":
            body: dict[str, Any] = {"model": name, "query": "w1", "documents": TEXTS}
            return str(len(client.post("/rerank", cast_to=object, body=body)["results"]))  # type: ignore[index]
        messages: Any = [{"role": "user", "content": "你好"}]
        return str(client.chat.completions.create(model=name, messages=messages, seed=1).choices[0].message.content)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(32)))
    assert {answers[index] for index in range(32) if index % 4 in (1, 2)} == {"4"}
    assert len({answers[index] for index in range(32) if index % 4 in (0, 3)}) == 1


def test_only_an_administrator_loads_and_unloads(server: Server) -> None:
    url = f"{server.base_url}/models/sentences"
    for action in ("load", "unload"):
        refused = requests.post(f"{url}/{action}", headers=headers(), timeout=60)
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "insufficient_permissions"
    assert requests.post(f"{url}/load", headers=headers(ADMINISTRATOR), timeout=60).status_code == 200
    assert models(server)["sentences"]["state"] == "loaded"
    assert requests.post(f"{url}/unload", headers=headers(ADMINISTRATOR), timeout=60).status_code == 200
    assert models(server)["sentences"]["state"] == "available"
    embeddings = {"model": "sentences", "input": "w1"}
    reply = requests.post(f"{server.base_url}/embeddings", json=embeddings, headers=headers(), timeout=60)
    assert reply.status_code == 200  # it is loaded again


def test_the_metrics_have_a_label_for_each_served_model(server: Server) -> None:
    seen = server.metrics(headers())
    assert all(f'chatglm_model_loaded{{model="{name}"}}' in seen for name in NAMES)
    unknown = {"model": "never-heard-of", "input": "w1"}
    refused = requests.post(f"{server.base_url}/embeddings", json=unknown, headers=headers(), timeout=10)
    assert refused.status_code == 404
    assert "sentences" in refused.json()["error"]["message"]
    assert not any("never-heard-of" in name for name in server.metrics(headers()))
