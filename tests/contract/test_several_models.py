"""Several models in one process: found by name, loaded when asked for, unloaded when their memory is needed."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from serving.openai.limits import ApiLimits
from serving.worker import model_loader
from serving.worker.model_source import ModelSource
from tests.contract.several import Several, several_models, store_models
from tests.contract.tiny import assert_openai_error

# GiB. A tiny model is planned with 110 MiB, 45 of them its cache, and takes 65 once it is loaded
ENOUGH_FOR_TWO, ENOUGH_FOR_ONE, NOT_ENOUGH = 0.2, 0.15, 0.1


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    return store_models(tmp_path_factory.mktemp("several"))


async def text_of(several: Several, name: str) -> str:
    response = await several.chat(name, max_tokens=100)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_the_first_is_preloaded_and_others_load_when_they_are_asked_for(sources: dict[str, ModelSource]) -> None:
    async def run() -> None:
        async with several_models(sources) as several:
            answers = await asyncio.gather(*(several.chat(name) for name in ("one", "two", "two", "chatglm2-6b")))
            assert [answer.status_code for answer in answers] == [200] * 4
            assert several.states() == {"one": "loaded", "two": "loaded", "three": "available"}
            listed = (await several.http.get("/models")).json()["data"]
            assert [each["id"] for each in listed] == ["one", "chatglm2-6b", "chatglm", "two", "three"]
            two = listed[3]
            assert (two["state"], two["abilities"], two["family"]) == ("loaded", ["chat", "embeddings"], "chatglm2")
            assert (two["precision"], two["max_model_len"] > 0, two["memory_bytes"] > 0) == ("float32", True, True)
            error = assert_openai_error(await several.chat("four"), 404)
            assert error["message"].endswith("Served here: one, chatglm2-6b, chatglm, two, three.")

    asyncio.run(run())


def test_a_stream_says_how_far_its_model_is_and_others_go_on(sources: dict[str, ModelSource]) -> None:
    may_load = threading.Event()

    def slow(name: str) -> None:
        if name == "two":
            may_load.wait(30)

    async def run() -> None:
        async with several_models(sources, load=slow, limits=ApiLimits(progress_seconds=0.05)) as several:
            stream = asyncio.create_task(several.chat("two", stream=True))
            whole = asyncio.create_task(several.chat("two"))
            await asyncio.sleep(0.3)
            assert (await several.chat("one")).status_code == 200
            assert several.states()["two"] == "loading"
            assert not whole.done()
            may_load.set()
            text = (await stream).text
            comments = [line for line in text.splitlines() if line.startswith(":")]
            assert len(comments) >= 2
            assert comments[0] == ": loading 0%"
            assert text.endswith("data: [DONE]\n\n")
            assert (await whole).status_code == 200

    asyncio.run(run())


def test_a_client_that_waits_too_long_for_a_model_is_told(sources: dict[str, ModelSource]) -> None:
    may_load = threading.Event()

    async def run() -> None:
        limits = ApiLimits(load_seconds=0.1, progress_seconds=0.02)
        async with several_models(sources, load=lambda name: may_load.wait(30), limits=limits) as several:
            response = await several.chat("one")
            assert assert_openai_error(response, 503)["code"] == "model_loading"
            assert response.headers["retry-after"]
            stream = (await several.chat("one", stream=True)).text
            assert '"code": "model_loading"' in stream
            assert "[DONE]" not in stream
            may_load.set()

    asyncio.run(run())


def test_the_least_recently_used_is_unloaded_for_another(sources: dict[str, ModelSource]) -> None:
    async def run() -> None:
        async with several_models(sources, memory=ENOUGH_FOR_TWO) as several:
            before = await text_of(several, "two")
            await text_of(several, "one")
            assert several.states() == {"one": "loaded", "two": "loaded", "three": "available"}
            await text_of(several, "three")
            assert several.states() == {"one": "loaded", "two": "available", "three": "loaded"}
            assert await text_of(several, "two") == before
            assert several.states() == {"one": "available", "two": "loaded", "three": "loaded"}

    asyncio.run(run())


def test_a_model_in_use_is_never_unloaded(sources: dict[str, ModelSource]) -> None:
    async def run() -> None:
        async with several_models(sources, memory=ENOUGH_FOR_ONE) as several:
            assert (await several.chat("one")).status_code == 200
            long = asyncio.create_task(several.chat("one", max_tokens=100))
            one = several.registry.default.running
            assert one is not None
            while not one.use.num_requests and not long.done():
                await asyncio.sleep(0)
            refused = await several.chat("two")
            error = assert_openai_error(refused, 503)
            assert error["code"] == "model_memory"
            assert "GiB" in error["message"]
            assert refused.headers["retry-after"]
            assert_openai_error(await several.http.post("/models/one/unload"), 409)
            assert (await long).status_code == 200
            assert (await several.chat("two")).status_code == 200
            assert several.states()["one"] == "available"

    asyncio.run(run())


def test_a_model_that_has_just_been_loaded_answers_before_it_is_unloaded_for_another(
    sources: dict[str, ModelSource],
) -> None:
    async def run() -> None:
        async with several_models(sources, memory=ENOUGH_FOR_ONE) as several:
            for _ in range(5):
                replies = await asyncio.gather(several.chat("two"), several.chat("three"))
                refused = [reply.json()["error"]["code"] for reply in replies if reply.status_code != 200]
                assert refused in ([], ["model_memory"])

    asyncio.run(run())


def test_a_model_that_can_never_fit_is_the_clients_error(sources: dict[str, ModelSource]) -> None:
    async def run() -> None:
        async with several_models(sources, memory=NOT_ENOUGH) as several:
            error = assert_openai_error(await several.chat("two"), 400)
            assert (error["param"], error["code"]) == ("model", "model_too_large")

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_is_its_own_error_and_is_tried_again_later(
    sources: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[str] = []

    def failing(name: str) -> None:
        attempts.append(name)
        if name == "two" and attempts.count("two") == 1:
            raise OSError("/secret/place is damaged")

    async def run() -> None:
        async with several_models(sources, load=failing) as several:
            for _ in range(2):
                response = await several.chat("two")
                assert assert_openai_error(response, 503)["code"] == "model_load_failed"
                assert "secret" not in response.text
            assert attempts.count("two") == 1
            assert several.states() == {"one": "loaded", "two": "failed", "three": "available"}
            assert (await several.chat("one")).status_code == 200
            monkeypatch.setattr(model_loader, "RETRY_SECONDS", 0.0)
            assert (await several.chat("two")).status_code == 200

    asyncio.run(run())


def test_models_are_loaded_and_unloaded_by_request(sources: dict[str, ModelSource]) -> None:
    async def run() -> None:
        async with several_models(sources) as several:
            loaded = await several.http.post("/models/two/load", timeout=60)
            assert (loaded.status_code, loaded.json()["state"]) == (200, "loaded")
            for _ in range(2):  # the second has nothing to do
                unloaded = await several.http.post("/models/two/unload")
                assert (unloaded.status_code, unloaded.json()["state"]) == (200, "available")
            assert_openai_error(await several.http.post("/models/four/load"), 404)

    asyncio.run(run())


def test_an_idle_model_is_unloaded_after_its_time(sources: dict[str, ModelSource]) -> None:
    async def run() -> None:
        async with several_models(sources, idle_minutes=0.001) as several:
            assert (await several.chat("one")).status_code == 200
            until = time.monotonic() + 20
            while several.states()["one"] == "loaded" and time.monotonic() < until:
                await asyncio.sleep(0.05)
                several.loader.unload_idle()
            assert several.states()["one"] == "available"
            assert (await several.chat("one")).status_code == 200

    asyncio.run(run())


def test_streams_of_two_models_share_the_device(sources: dict[str, ModelSource]) -> None:
    async def run() -> None:
        async with several_models(sources) as several:
            alone = [await text_of(several, name) for name in ("one", "two")]
            together = await asyncio.gather(*(text_of(several, name) for name in ("one", "two", "one", "two")))
            assert together == alone * 2

    asyncio.run(run())


def test_a_damaged_file_is_that_models_error_alone(tmp_path: Path) -> None:
    sources = store_models(tmp_path)
    weights = next(sources["two"].path.glob("*.safetensors"))
    weights.unlink()
    weights.write_bytes(b"not weights")

    async def run() -> None:
        async with several_models(sources) as several:
            assert assert_openai_error(await several.chat("two"), 503)["code"] == "model_load_failed"
            assert (await several.chat("one")).status_code == 200

    asyncio.run(run())
