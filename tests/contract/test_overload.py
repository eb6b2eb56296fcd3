"""More requests than the server can take: which are refused, which are served, how long they wait."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import anyio
import httpx2
import pytest
import torch
from starlette.requests import Request

from serving.admission.admission_control import AdmissionLimits
from serving.engine.interface import EngineLimits
from serving.engine.output_queue import MAX_UNREAD
from serving.http.errors import APIError
from serving.openai.limits import ApiLimits
from serving.openai.start_generation import GenerationStarter
from serving.registry import ModelRegistry, ServedModel
from serving.worker.bentoml_generate import GenerateRequest, generate_text
from tests.contract.tiny import NAME, assert_openai_error
from tests.contract.worker import CHAT, SlowReader, at_rest, body, client, running_worker

SMALL = EngineLimits(max_sequences=2, kv_tokens=4096)


def test_past_the_queue_is_a_429_with_the_time_to_wait_and_all_others_are_answered(folder: Path) -> None:
    released = threading.Event()

    async def run() -> None:
        with running_worker(folder, released.wait, SMALL, AdmissionLimits(max_queued_requests=2)) as worker:
            async with client(worker) as http, client(worker, "bob") as other:
                waiting = [asyncio.create_task(http.post(CHAT, json=body(max_tokens=4))) for _ in range(3)]
                await asyncio.sleep(0.2)
                refused = await http.post(CHAT, json=body(max_tokens=4))
                assert assert_openai_error(refused, 429)["code"] == "rate_limit_exceeded"
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.headers["x-ratelimit-remaining-requests"] == "0"
                waiting.append(asyncio.create_task(other.post(CHAT, json=body(max_tokens=4))))
                await asyncio.sleep(0.1)
                released.set()
                replies = await asyncio.gather(*waiting)
                assert [reply.status_code for reply in replies] == [200] * 4
                assert len({reply.json()["choices"][0]["message"]["content"] for reply in replies}) == 1
                assert replies[0].headers["x-ratelimit-limit-requests"] == "3"
                await at_rest(worker)

    asyncio.run(run())


def test_a_hundred_requests_of_one_client_do_not_delay_another_client(folder: Path) -> None:
    async def run() -> None:
        with running_worker(folder, lambda: time.sleep(0.001), SMALL) as worker:
            finished: list[str] = []
            async with client(worker) as greedy, client(worker, "bob") as modest:

                async def ask(http: httpx2.AsyncClient, name: str, number: int) -> None:
                    reply = await http.post(CHAT, json=body(f"{name} {number}", max_tokens=8))
                    assert reply.status_code == 200, reply.text
                    finished.append(name)

                tasks = [asyncio.create_task(ask(greedy, "greedy", i)) for i in range(100)]
                while not finished:
                    await asyncio.sleep(0.001)
                before = len(finished)
                await ask(modest, "modest", 0)
                assert len(finished) - before < 20
                await asyncio.gather(*tasks)

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_own_deadline_is_a_408_and_the_slot_is_free(stream: bool, folder: Path) -> None:
    released = threading.Event()

    async def run() -> None:
        with running_worker(folder, released.wait, SMALL) as worker:
            async with client(worker) as http:
                reply = await http.post(
                    CHAT, json=body(max_tokens=8, stream=stream), headers={"x-request-timeout": "0.3"}
                )
                assert not released.is_set()  # the network is still in its first step
                assert assert_openai_error(reply, 408)["code"] == "request_timeout"
                assert reply.headers["x-should-retry"] == "false"
                released.set()
                await at_rest(worker)

    asyncio.run(run())


def test_the_servers_deadline_is_a_504_and_cannot_be_lengthened(folder: Path) -> None:
    released = threading.Event()

    async def run() -> None:
        with running_worker(folder, released.wait, SMALL, limits=ApiLimits(timeout_seconds=0.3)) as worker:
            async with client(worker) as http:
                reply = await http.post(CHAT, json=body(max_tokens=8), headers={"x-request-timeout": "60"})
                assert_openai_error(reply, 504)
                released.set()
                await at_rest(worker)

    asyncio.run(run())


def test_a_deadline_in_the_middle_of_a_stream_is_an_event(folder: Path) -> None:
    async def run() -> None:
        with running_worker(folder, lambda: time.sleep(0.02), SMALL) as worker:
            async with client(worker) as http:
                reply = await http.post(
                    CHAT,
                    json=body(max_tokens=200, ignore_eos=True, stream=True),
                    headers={"x-request-timeout": "0.5"},
                )
                assert reply.status_code == 200
                events = [line for line in reply.text.split("\n\n") if line.startswith("data: ")]
                assert len(events) > 3
                assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "request_timeout"
                await at_rest(worker)
                assert worker.records[-1].error_code == "request_timeout"

    asyncio.run(run())


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf", "1e999"])
def test_a_deadline_that_is_no_number_of_seconds_is_a_400(value: str, folder: Path) -> None:
    async def run() -> None:
        with running_worker(folder) as worker:
            async with client(worker) as http:
                reply = await http.post(CHAT, json=body(), headers={"x-request-timeout": value})
                assert "x-request-timeout" in assert_openai_error(reply, 400)["message"]

    asyncio.run(run())


def test_limits_of_a_key_are_its_own(folder: Path) -> None:
    async def run() -> None:
        with running_worker(folder, admission_limits=AdmissionLimits(requests_per_minute=2)) as worker:
            async with client(worker) as http, client(worker, "bob") as other:
                statuses = [(await http.post(CHAT, json=body(max_tokens=2))).status_code for _ in range(3)]
                assert statuses == [200, 200, 429]
                reply = await other.post(CHAT, json=body(max_tokens=2))
                assert reply.status_code == 200
                assert reply.headers["x-ratelimit-limit-requests"] == "2"
                assert reply.headers["x-ratelimit-remaining-requests"] == "1"

    asyncio.run(run())


def test_the_native_route_has_the_same_admission(folder: Path) -> None:
    async def run() -> None:
        with running_worker(folder, admission_limits=AdmissionLimits(requests_per_minute=1)) as worker:
            registry = ModelRegistry([ServedModel(NAME, running=worker.model)])
            generations = GenerationStarter(registry, worker.admission, ApiLimits())
            request = Request({"type": "http", "method": "POST", "path": "/generate", "headers": [], "client": None})
            question = GenerateRequest("你好", "", 0.0, 1.0, 8)
            texts = [text async for text in generate_text(generations, request, registry, question)]
            assert "".join(texts)
            with pytest.raises(APIError) as caught:
                await anext(generate_text(generations, request, registry, question))
            assert caught.value.status == 429
            await at_rest(worker)

    asyncio.run(run())


def test_the_native_route_releases_its_permit_however_early_its_client_leaves(folder: Path) -> None:
    """BentoML cancels with anyio, whose scopes cancel again at every wait: releasing must not wait for anything."""
    never = threading.Event()

    async def run() -> None:
        with running_worker(folder, lambda: never.wait(0.2)) as worker:
            registry = ModelRegistry([ServedModel(NAME, running=worker.model)])
            generations = GenerationStarter(registry, worker.admission, ApiLimits())
            request = Request({"type": "http", "method": "POST", "path": "/generate", "headers": [], "client": None})
            for seconds in (0.0, 0.001, 0.02):
                with anyio.move_on_after(seconds):
                    texts = generate_text(generations, request, registry, GenerateRequest("你好", "", 0.0, 1.0, 64))
                    async with aclosing(texts):
                        async for _ in texts:
                            pass
                assert worker.admission.num_answers == 0
            await at_rest(worker)

    asyncio.run(run())


def test_out_of_memory_is_not_to_be_tried_again(folder: Path) -> None:
    failing = {2}
    count = 0

    def before() -> None:
        nonlocal count
        count += 1
        if count in failing:
            raise torch.OutOfMemoryError("injected")

    async def run() -> None:
        with running_worker(folder, before) as worker:
            async with client(worker) as http:
                reply = await http.post(CHAT, json=body(max_tokens=8))
                assert assert_openai_error(reply, 500)["code"] == "out_of_memory"
                assert reply.headers["x-should-retry"] == "false"
                assert (await http.post(CHAT, json=body(max_tokens=8))).status_code == 200

    asyncio.run(run())


def test_a_small_cache_preempts_and_every_answer_is_the_same_as_alone(folder: Path) -> None:
    async def run() -> None:
        with running_worker(folder, engine_limits=EngineLimits(max_sequences=8, kv_tokens=512)) as worker:
            async with client(worker) as http:
                bodies = [
                    body(f"{i} hello", max_tokens=100, ignore_eos=True, seed=i, temperature=0.9) for i in range(8)
                ]
                alone = [(await http.post(CHAT, json=each)).json()["choices"][0] for each in bodies]
                together = [reply.json()["choices"][0] for reply in await _all(http, bodies)]
                assert together == alone
                assert worker.engine.stats().preemptions > 0
                await at_rest(worker)

    asyncio.run(run())


async def _all(http: httpx2.AsyncClient, bodies: list[dict[str, object]]) -> list[httpx2.Response]:
    return list(await asyncio.gather(*(http.post(CHAT, json=each) for each in bodies)))


def test_a_reader_that_stops_reading_delays_no_other_request_and_is_dropped(folder: Path) -> None:
    limits = ApiLimits(stall_seconds=1.5)

    async def run() -> None:
        with running_worker(folder, engine_limits=replace(SMALL, kv_tokens=8192), limits=limits) as worker:
            payload = json.dumps(body(max_tokens=200, ignore_eos=True, stream=True)).encode()
            reader = SlowReader(worker, payload)
            reading = asyncio.create_task(reader.run())
            async with client(worker) as http:
                while reader.num_pieces < 4:
                    await asyncio.sleep(0.01)
                assert (await http.post(CHAT, json=body(max_tokens=8))).status_code == 200
            await asyncio.wait_for(reading, 10)
            assert b"[DONE]" not in reader.last
            assert worker.records[0].is_aborted or worker.records[-1].is_aborted
            await at_rest(worker)

    asyncio.run(run())
    assert MAX_UNREAD > 200  # the engine's own pause is tested in tests/parity/test_faults.py
