"""No request fails a step of others: ids that the network lacks are refused, a step that fails runs again in parts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from starlette.applications import Starlette
from torch import Tensor

from models.families.hf import FAMILY
from models.family import ImportRefused
from models.store.progress import no_progress
from serving.engine.interface import AttentionFunction, CausalLM, EngineLimits, PromptLayout, RaggedBatch
from serving.engine.native.engine import NativeEngine
from serving.generation.interface import ChatFormat
from serving.generation.pipeline import RunningModel
from tests.contract.tiny import (
    CONTEXT,
    NAME,
    assert_openai_error,
    chat_format,
    chunks,
    in_front_of,
    post,
    random_network,
    serving,
)
from tests.hf_folders import write_folder

STREAMED = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "seed": 1}


class RaisesFor:
    """A network that is really another one, but raises for every batch that has one of some tokens."""

    def __init__(self, network: CausalLM, token_ids: Sequence[int], error: Callable[[], Exception]) -> None:
        self.shape, self.device, self.dtype = network.shape, network.device, network.dtype
        self._network, self._token_ids, self._error = network, set(token_ids), error

    def layout(self, prompt_ids: Sequence[int]) -> PromptLayout:
        return self._network.layout(prompt_ids)

    def forward(self, batch: RaggedBatch, attend: AttentionFunction) -> Tensor:
        hidden = self._network.forward(batch, attend)  # the rows are in the cache when it fails
        if self._token_ids & set(batch.token_ids.tolist()):
            raise self._error()
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self._network.logits(hidden)


def bad_tokens(form: ChatFormat, num_bad: int) -> list[int]:
    """Those of letters that no text here has."""
    return [form.encode(f"a{letter}")[-1] for letter in "zjv"[:num_bad]]


@contextmanager
def raising(
    folder: Path, error: Callable[[], Exception] = lambda: IndexError("injected"), num_bad: int = 1
) -> Iterator[tuple[Starlette, RunningModel, list[int]]]:
    """(the application, its model, the tokens that the network raises for)"""
    form = chat_format(folder, "chatglm2")
    bad = bad_tokens(form, num_bad)
    network = RaisesFor(random_network(form.num_tokens), bad, error)
    engine = NativeEngine(network, EngineLimits(max_batch_tokens=64, kv_tokens=4096))
    engine.start()
    model = RunningModel(engine, form, CONTEXT)
    with in_front_of(model) as app:
        yield app, model, bad


@asynccontextmanager
async def connected(app: Starlette) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test", timeout=60) as http:
        yield http


def text(stream: httpx2.Response) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks(stream) if chunk["choices"])


def streamed(number: int, bad: Sequence[int]) -> dict[str, Any]:
    """Half of the requests greedy, half sampled. Their answers have none of the bad tokens."""
    messages = [{"role": "user", "content": f"Hello world {number}"}]
    sampling = {"temperature": number % 2, "seed": number, "logit_bias": dict.fromkeys(map(str, bad), -100)}
    return {"model": NAME, "messages": messages, "stream": True, "max_tokens": 60, "ignore_eos": True, **sampling}


@contextmanager
def llama_with_an_unused_token(folder: Path) -> Iterator[tuple[Starlette, int]]:
    """(a tiny Llama behind the application, the id of a [PAD] that its embedding has no row for)"""
    source, stored = folder / "source", folder / "stored"
    stored.mkdir(parents=True)
    pad = add_token(source, "[PAD]")
    metadata = FAMILY.import_checkpoint(source, stored, {}, no_progress)
    loaded = FAMILY.load(stored, metadata, torch.device("cpu"), "float32", no_progress)
    engine = NativeEngine(loaded.network, EngineLimits(kv_tokens=4096))
    engine.start()
    with in_front_of(RunningModel(engine, loaded.chat_format, CONTEXT)) as app:
        yield app, pad


def add_token(folder: Path, content: str, **flags: Any) -> int:
    """Write a Llama and give its tokenizer one token more than its embedding has."""
    tokenizer = write_folder(folder, "llama")
    written = json.loads((folder / "tokenizer.json").read_text())
    token_id = int(json.loads((folder / "config.json").read_text())["vocab_size"])
    assert token_id == len(tokenizer)
    token = {"id": token_id, "content": content, "single_word": False, "lstrip": False, "rstrip": False}
    written["added_tokens"].append({**token, "normalized": False, "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(written))
    return token_id


def test_an_id_that_the_network_lacks_is_refused_and_another_stream_does_not_notice(tmp_path: Path) -> None:
    with llama_with_an_unused_token(tmp_path) as (app, pad):
        stream = {"model": NAME, "prompt": "Hello", "stream": True, "temperature": 0, "max_tokens": 100}
        alone = post(app, "/completions", stream).text
        requests: list[tuple[str, dict[str, Any], str]] = [
            ("/completions", {"prompt": [1, pad]}, "prompt"),
            ("/completions", {"prompt": [[1, 5], [1, pad]]}, "prompt[1]"),
            ("/completions", {"prompt": "Hi", "logit_bias": {str(pad): 1}}, "logit_bias"),
            ("/chat/completions", {"messages": STREAMED["messages"], "logit_bias": {str(pad): 1}}, "logit_bias"),
            ("/embeddings", {"input": [1, pad]}, "input"),
            ("/embeddings", {"input": [[1, 5], [1, pad]]}, "input[1]"),
            ("/detokenize", {"tokens": [1, pad]}, "tokens[1]"),
        ]

        async def run() -> str:
            async with connected(app) as http:
                running = asyncio.create_task(http.post("/completions", json=stream))
                for path, body, param in requests * 2:
                    refused = await http.post(path, json={"model": NAME, **body})
                    error = assert_openai_error(refused, 400)
                    assert error["param"] == param
                    assert str(pad) in error["message"]
                return (await running).text

        together = asyncio.run(run())
        assert [line.split('"choices"')[-1] for line in together.split("\n\n")] == [
            line.split('"choices"')[-1] for line in alone.split("\n\n")
        ]


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        ("extra", {"special": False}),  # a word: the tokenizer finds it in every text
        ("[INST]", {"special": False}),  # markup that the template writes
    ],
)
def test_an_import_whose_prompts_would_have_such_ids_is_refused(
    tmp_path: Path, content: str, flags: dict[str, Any]
) -> None:
    add_token(tmp_path / "source", content, **flags)
    template = "{% for m in messages %}[INST]{{ m.content }}{% endfor %}"
    (tmp_path / "source" / "chat_template.jinja").write_text(template)
    (tmp_path / "stored").mkdir()
    with pytest.raises(ImportRefused, match=r"vocab_size of config\.json"):
        FAMILY.import_checkpoint(tmp_path / "source", tmp_path / "stored", {}, no_progress)


@pytest.mark.parametrize(("error", "code"), [(IndexError, "server_error"), (torch.OutOfMemoryError, "out_of_memory")])
def test_a_request_that_fails_its_step_fails_alone(folder: Path, error: type[Exception], code: str) -> None:
    streams = [streamed(number, bad_tokens(chat_format(folder, "chatglm2"), 3)) for number in range(6)]
    with serving(folder) as app:
        expected = [text(post(app, "/chat/completions", stream)) for stream in streams]
    with raising(folder, lambda: error("injected"), num_bad=3) as (app, model, bad):

        async def run() -> list[httpx2.Response]:
            async with connected(app) as http:
                running = [asyncio.create_task(http.post("/chat/completions", json=stream)) for stream in streams]
                sick: list[asyncio.Task[httpx2.Response]] = []
                for token_id in (*bad, *bad):
                    while model.engine.stats().num_running < 6:
                        await asyncio.sleep(0)
                    for path, field in (("/completions", "prompt"), ("/embeddings", "input")):
                        body = {"model": NAME, field: [*range(70, 80), token_id]}
                        sick.append(asyncio.create_task(http.post(path, json=body)))
                for failed in await asyncio.gather(*sick):
                    assert assert_openai_error(failed, 500)["code"] == code
                return await asyncio.gather(*running)

        assert [text(response) for response in asyncio.run(run())] == expected
        # nothing of what failed is in the cache
        assert [text(post(app, "/chat/completions", stream)) for stream in streams] == expected


def test_ten_failing_requests_in_a_row_leave_the_server_ready(folder: Path) -> None:
    with raising(folder) as (app, model, (bad,)):
        for _ in range(10):
            assert_openai_error(post(app, "/completions", {"model": NAME, "prompt": [5, bad]}), 500)
            assert_openai_error(post(app, "/embeddings", {"model": NAME, "input": [5, bad]}), 500)
        assert model.engine.is_alive
        body = {"model": NAME, "prompt": "Hello", "logit_bias": {str(bad): -100}}
        assert post(app, "/completions", body).status_code == 200


def test_a_long_embedding_is_the_same_when_its_step_had_to_run_again(folder: Path) -> None:
    """Its sum of hidden states must not count the rows of a failed step twice."""
    with raising(folder) as (app, _, (bad,)):
        body = {"model": NAME, "input": [token_id for token_id in range(70, 270) if token_id != bad]}
        (alone,) = post(app, "/embeddings", body).json()["data"]

        async def run() -> httpx2.Response:
            async with connected(app) as http:
                sick = [{"model": NAME, "prompt": [*[5] * 30, bad], "max_tokens": 2}] * 4
                first, *failed = await asyncio.gather(
                    http.post("/embeddings", json=body), *(http.post("/completions", json=each) for each in sick)
                )
                assert {response.status_code for response in failed} == {500}
                return first

        (together,) = asyncio.run(run()).json()["data"]
        assert together["embedding"] == pytest.approx(alone["embedding"], abs=1e-5)
