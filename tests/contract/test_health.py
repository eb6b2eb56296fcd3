"""API keys, health, shutdown, clients that disconnect, and what logs, metrics and traces say of them."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY
from starlette.routing import Route
from starlette.types import Message

from serving.admission.admission_control import AdmissionLimits
from serving.engine.interface import EngineLimits, PromptLayout
from serving.http.access_log import AccessLog, to_fields
from serving.http.access_middleware import RouteNames
from serving.worker.tracing import Tracing
from tests.contract.tiny import HookedNetwork, assert_openai_error
from tests.contract.worker import CHAT, Worker, at_rest, body, client, running_worker

SECRET = "MARKER-of-a-prompt"
SMALL = EngineLimits(max_sequences=2, kv_tokens=4096)


def test_without_a_key_every_path_but_health_is_a_401(folder: Path) -> None:
    async def run() -> None:
        with running_worker(folder) as worker:
            async with client(worker, "mallory") as http:
                for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/metrics"), ("GET", "/docs.json")):
                    reply = await http.request(method, path)
                    assert assert_openai_error(reply, 401)["code"] == "invalid_api_key"
                    assert reply.headers["www-authenticate"].startswith("Bearer")
                assert (await http.get("/livez")).status_code == 404  # it came through to the application
                reply = await http.post("/v1/messages", json={})
                assert reply.status_code == 401
                assert reply.json()["error"]["type"] == "authentication_error"
            async with client(worker) as http:
                http.headers.pop("authorization")
                headers = {"x-api-key": "sk-alice"}  # as Anthropic's clients send it
                assert (await http.get("/v1/models", headers=headers)).status_code == 200
                assert (await http.get("/v1/models", headers={"x-api-key": "sk-nobody"})).status_code == 401

    asyncio.run(run())


@pytest.mark.parametrize("headers", [{"x-big": "x" * 40_000}, {f"x-{i}": "y" for i in range(200)}])
def test_too_many_or_too_large_headers_are_a_431(headers: dict[str, str], folder: Path) -> None:
    async def run() -> None:
        with running_worker(folder) as worker:
            async with client(worker) as http:
                assert_openai_error(await http.get("/v1/models", headers=headers), 431)

    asyncio.run(run())


class TwoWay(HookedNetwork):
    """A network whose prompts cannot be divided, as ChatGLM-6B's."""

    def layout(self, prompt_ids: Sequence[int]) -> PromptLayout:
        return PromptLayout(num_two_way=len(prompt_ids))


def test_a_step_of_more_rows_than_usual_may_take_longer(folder: Path) -> None:
    step = threading.Event()

    async def run() -> None:
        limits = EngineLimits(max_batch_tokens=16)
        with running_worker(folder, step.wait, limits, max_step_seconds=3, hooked=TwoWay) as worker:
            try:
                async with client(worker) as http:
                    text = "你好" * 60
                    asking = {"messages": [{"role": "user", "content": text}]}
                    waiting = asyncio.create_task(http.post(CHAT, json=body(max_tokens=2) | asking))
                    while not worker.engine.step_size:
                        await asyncio.sleep(0.01)
                    assert worker.engine.step_size > 4
                    for _ in range(12):
                        worker.monitor.tick()
                    assert worker.monitor.is_ready
                    step.set()
                    assert (await waiting).status_code == 200
            finally:
                step.set()

    asyncio.run(run())


def test_a_hung_step_fails_its_requests_and_the_engine_may_recover(folder: Path) -> None:
    step = threading.Event()

    async def run() -> None:
        with running_worker(folder, step.wait, max_step_seconds=3) as worker:
            monitor = worker.monitor
            try:
                async with client(worker) as http:
                    monitor.tick()
                    assert monitor.is_ready
                    waiting = asyncio.create_task(http.post(CHAT, json=body()))
                    while not worker.engine.is_busy:
                        await asyncio.sleep(0.01)
                    for _ in range(5):
                        monitor.tick()
                    assert not monitor.is_alive
                    assert not monitor.is_ready
                    assert_openai_error(await asyncio.wait_for(waiting, 5), 503)
                    step.set()
                    await at_rest(worker)
                    monitor.tick()
                    assert monitor.is_ready
                    assert (await http.post(CHAT, json=body(max_tokens=2))).status_code == 200
            finally:
                step.set()

    asyncio.run(run())


def test_an_idle_engine_is_not_treated_as_hung(folder: Path) -> None:
    with running_worker(folder, max_step_seconds=1) as worker:
        for _ in range(10):
            worker.monitor.tick()
        assert worker.monitor.is_ready


def test_three_failed_steps_in_a_row_make_the_worker_not_alive(folder: Path) -> None:
    def fail() -> None:
        raise RuntimeError("injected")

    async def run() -> None:
        with running_worker(folder, fail) as worker:
            async with client(worker) as http:
                for _ in range(3):
                    assert worker.monitor.is_alive
                    assert_openai_error(await http.post(CHAT, json=body()), 500)
                assert not worker.monitor.is_alive
                reply = await http.post(CHAT, json=body())
                assert assert_openai_error(reply, 503)["code"] == "server_unavailable"
                assert reply.headers["retry-after"]

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_in_one_answers_text_ends_that_answer_alone(
    stream: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The detokenizer is made to raise at a token that a bias forces one of two answers to take."""
    poison = 300

    async def run() -> None:
        with running_worker(folder, lambda: time.sleep(0.002)) as worker:
            decode = worker.model.chat_format.decode

            def raising(token_ids: Sequence[int]) -> str:
                if poison in token_ids:
                    raise RuntimeError("injected")
                return decode(token_ids)

            monkeypatch.setattr(worker.model.chat_format, "decode", raising)
            async with client(worker) as http:
                expected = (await http.post(CHAT, json=body(max_tokens=20))).json()["choices"]
                healthy = asyncio.create_task(http.post(CHAT, json=body(max_tokens=20)))
                sick = body("x", max_tokens=20, logit_bias={str(poison): 100}, stream=stream)
                assert_openai_error(await http.post(CHAT, json=sick), 500)
                assert (await healthy).json()["choices"] == expected
                await at_rest(worker)

    asyncio.run(run())


def test_while_draining_a_stream_continues_and_new_requests_get_503(folder: Path) -> None:
    async def run() -> None:
        with running_worker(folder, lambda: time.sleep(0.005)) as worker:
            async with client(worker) as http:
                stream = asyncio.create_task(http.post(CHAT, json=body(max_tokens=60, ignore_eos=True, stream=True)))
                while not worker.engine.is_busy:
                    await asyncio.sleep(0.01)
                worker.state.is_draining = True
                assert not worker.monitor.is_ready
                assert worker.monitor.is_alive
                late = await http.get("/v1/models")
                assert_openai_error(late, 503)
                assert late.headers["retry-after"]
                assert late.headers["connection"] == "close"
                # passed on: this worker has no route for it, service.py has
                assert (await http.get("/metrics")).status_code == 404
                assert (await stream).text.endswith("data: [DONE]\n\n")

    asyncio.run(run())


async def _abort(worker: Worker, payload: bytes, after_pieces: int, seconds: float) -> None:
    """Ask, and leave after some pieces of the answer or some seconds, whatever comes first."""
    sent = False
    left = asyncio.Event()
    num_pieces = 0

    async def receive() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": payload, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal num_pieces
        num_pieces += message["type"] == "http.response.body"
        if num_pieces > after_pieces:
            left.set()

    headers = [(b"authorization", b"Bearer sk-alice"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": CHAT, "root_path": "", "query_string": b"", "headers": headers,
        "client": ("192.0.2.1", 1), "server": ("test", 80), "scheme": "http", "http_version": "1.1",
    }  # fmt: skip
    asyncio.get_running_loop().call_later(seconds, left.set)
    await worker.app(scope, receive, send)


def test_hundreds_of_clients_that_disconnect_at_every_stage_release_everything(folder: Path) -> None:
    async def run() -> None:
        with running_worker(folder, lambda: time.sleep(0.001), SMALL, AdmissionLimits(1000)) as worker:
            aborts = []
            for i in range(300):
                payload = json.dumps(
                    body("long " * (i % 30), max_tokens=100, ignore_eos=True, stream=i % 3 > 0, n=1 + i % 2)
                )
                aborts.append(_abort(worker, payload.encode(), after_pieces=i % 5, seconds=0.05 + i % 7 / 10))
            await asyncio.gather(*aborts)
            await at_rest(worker)
            assert sum(record.is_aborted for record in worker.records) > 250
            async with client(worker) as http:
                assert (await http.post(CHAT, json=body(max_tokens=4))).status_code == 200

    asyncio.run(run())


def test_neither_prompts_nor_keys_are_in_any_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = iter([None, RuntimeError(f"a tensor of {SECRET}"), *[None] * 1000])

    def before() -> None:
        error = next(steps)
        if error:
            raise error

    async def run() -> None:
        with running_worker(folder, before) as worker:
            log = AccessLog("text", logging.getLogger("test.access"))
            async with client(worker) as http:
                await http.post(CHAT, json=body(SECRET, max_tokens=1))
                await http.post(CHAT, json=body(SECRET, max_tokens=8, stream=True))
                await http.post(CHAT, json=body(SECRET, temperature=9))
                await http.post(CHAT, content=b'{"messages": "' + SECRET.encode())
                await http.post(CHAT + f"?key={SECRET}", json=body(SECRET, stop=[SECRET], max_tokens=4))
                await http.post("/v1/completions", json={"model": SECRET, "prompt": SECRET})
                await http.post("/v1/tokenize", json={"model": "chatglm2-6b", "prompt": SECRET})
                await http.get("/v1/models", headers={"authorization": f"Bearer {SECRET}"})
            for record in worker.records:
                log(record, 0.1)

    with caplog.at_level(logging.WARNING, "httpx2"), caplog.at_level(logging.DEBUG):  # httpx2 is the client's own log
        asyncio.run(run())
    assert "status=200" in caplog.text
    assert "client=alice" in caplog.text
    assert SECRET not in caplog.text.replace(
        f"a tensor of {SECRET}", ""
    )  # torch's own words, in the engine's traceback
    assert "sk-alice" not in caplog.text


def test_a_body_that_is_sent_a_byte_at_a_time_is_a_408(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.http.json_body.BODY_SECONDS", 0.2)

    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.05)

    async def run() -> None:
        with running_worker(folder) as worker:
            async with client(worker) as http:
                assert_openai_error(await http.post(CHAT, content=drip()), 408)

    asyncio.run(run())


def test_the_log_line_has_tokens_times_and_the_reason(folder: Path) -> None:
    async def run() -> None:
        with running_worker(folder) as worker:
            async with client(worker) as http:
                await http.post(CHAT, json=body(max_tokens=3, ignore_eos=True), headers={"x-request-id": "mine"})
            fields = to_fields(worker.records[0], 0.5)
            assert fields.pop("ttft_ms") > 0
            assert fields == {
                "request_id": "mine",
                "method": "POST",
                "path": CHAT,
                "status": 200,
                "client": "alice",
                "model": "chatglm2-6b",
                "prompt_tokens": fields["prompt_tokens"],
                "completion_tokens": 3,
                "duration_ms": 500.0,
                "finish_reason": "length",
            }

    asyncio.run(run())


def test_a_json_log_line_is_json_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def run() -> None:
        with running_worker(folder) as worker:
            async with client(worker) as http:
                await http.get("/v1/none%0A%22{}")
            AccessLog("json", logging.getLogger("test.json"))(worker.records[0], 0.5)

    asyncio.run(run())
    line = json.loads(capsys.readouterr().out)
    assert line["status"] == 404
    assert line["error"] == "unknown_url"


def test_a_request_is_one_span_that_continues_the_clients_trace(folder: Path) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter, "chatglm2")
    trace_id = "0af7651916cd43dd8448eb211c80319c"

    async def run() -> None:
        with running_worker(folder) as worker:
            async with client(worker) as http:
                headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
                await http.post(CHAT, json=body(max_tokens=3, ignore_eos=True), headers=headers)
            tracing(worker.records[0], 0.5)
            tracing.flush()

    asyncio.run(run())
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == trace_id
    assert span.attributes["gen_ai.usage.output_tokens"] == 3
    assert span.attributes["gen_ai.request.model"] == "chatglm2-6b"


def test_metrics_labels_have_few_route_names_whatever_the_paths_are() -> None:
    names = RouteNames([Route("/models", print), Route("/models/{name:path}", print), Route("/{path:path}", print)])
    assert names.of("/v1/models") == "/v1/models"
    assert names.of("/models/x/y") == "/models/..."
    assert {names.of(f"/v1/x{i}") for i in range(100)} | {names.of("//"), names.of("/v1/models/a")} == {
        "unknown",
        "/v1/models/...",
    }


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"chatglm_{name}_total", labels) or 0.0


def test_aborted_and_failed_requests_are_counted(folder: Path) -> None:
    async def run() -> None:
        with running_worker(folder, lambda: time.sleep(0.002)) as worker:
            aborted, errors = counted("aborted_requests"), counted("request_errors", code="decimal_above_max_value")
            payload = json.dumps(body(max_tokens=200, ignore_eos=True, stream=True)).encode()
            await _abort(worker, payload, after_pieces=2, seconds=5)
            async with client(worker) as http:
                reply = await http.post(CHAT, json=body(temperature=9))
            assert counted("aborted_requests") == aborted + 1
            assert assert_openai_error(reply, 400)["code"] == "decimal_above_max_value"
            assert counted("request_errors", code="decimal_above_max_value") == errors + 1

    asyncio.run(run())
