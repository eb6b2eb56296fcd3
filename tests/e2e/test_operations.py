"""A real `bentoml serve` in operation: API keys, metrics, signals, killed and stopped workers."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import requests

from tests.e2e.server import Server, serving, wait_until_ready

KEY = "sk-operator-0123456789"
HEADERS = {"authorization": f"Bearer {KEY}"}
MARKER = "MARKER-of-a-prompt"


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("operations")
    keys = home / "keys"
    keys.write_text(f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()} operator\n")
    settings = {
        "CHATGLM_API_KEYS_FILE": str(keys),
        "CHATGLM_CORS_ORIGINS": "https://app.example",
        "CHATGLM_ACCESS_LOG": "json",
        "CHATGLM_GRACE_SECONDS": "600",
        "BENTOML_CONFIG_OPTIONS": "services.chatglm2.workers=2",
    }
    with serving(home, settings) as server:
        until(lambda: metrics(server).get("chatglm_ready") == 2, 120)  # `/readyz` is of one worker only
        yield server


def chat(server: Server, **fields: Any) -> requests.Response:
    message = {"role": "user", "content": f"你好 {MARKER}"}
    return requests.post(
        f"{server.base_url}/chat/completions",
        json={"model": "chatglm", "messages": [message], **fields},
        headers=HEADERS,
        stream=bool(fields.get("stream")),
        timeout=120,
    )


def metrics(server: Server) -> dict[str, float]:
    return server.metrics(HEADERS)


def until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_health_needs_no_key_and_everything_else_does(two_workers: Server) -> None:
    for path in ("/livez", "/readyz", "/healthz"):
        assert requests.get(two_workers.url + path, timeout=10).status_code == 200
    for path in ("/", "/docs.json", "/schema.json", "/metrics", "/models", "/v1/models", "/v1/nothing", "/generate"):
        reply = requests.get(two_workers.url + path, timeout=10)
        assert reply.status_code == 401, path
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"].startswith("Bearer")
        assert requests.get(two_workers.url + path, headers=HEADERS, timeout=10).status_code != 401, path


def test_browsers_of_the_configured_origin_may_call_and_others_may_not(two_workers: Server) -> None:
    for origin, allowed in (("https://app.example", True), ("https://evil.example", False)):
        reply = requests.options(
            f"{two_workers.base_url}/chat/completions",
            headers={
                "origin": origin,
                "access-control-request-method": "POST",
                "access-control-request-private-network": "true",
            },
            timeout=10,
        )
        assert ("access-control-allow-origin" in reply.headers) == allowed
        assert reply.status_code == (200 if allowed else 400)
        assert not allowed or reply.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate"])
def test_a_client_that_offers_an_upgrade_and_half_closes_is_answered(two_workers: Server, path: str) -> None:
    messages = [{"role": "user", "content": "你好"}]
    chat_body = {"model": "chatglm", "messages": messages, "stream": True, "max_tokens": 4}
    content = json.dumps(chat_body if path != "/generate" else {"prompt": "你好", "max_tokens": 4}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(content)}\r\n"
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n\r\n"
    )
    address = urlsplit(two_workers.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(head.encode() + content)
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b"HTTP/1.1 200 OK" in received
    assert received.endswith(b"\r\n0\r\n\r\n")


def test_metrics_add_up_over_two_workers_and_paths_do_not_make_series(two_workers: Server) -> None:
    time.sleep(1.5)  # each worker counts tokens once a second, those of earlier tests, too
    before = metrics(two_workers)
    for _ in range(8):
        assert chat(two_workers, max_tokens=4, ignore_eos=True).status_code == 200
    for i in range(50):
        requests.get(f"{two_workers.base_url}/random-{i}", headers=HEADERS, timeout=10)
    generated = before.get("chatglm_generation_tokens_total", 0) + 8 * 4
    until(lambda: metrics(two_workers).get("chatglm_generation_tokens_total") == generated)
    until(lambda: metrics(two_workers)["chatglm_kv_cache_used_tokens"] == 0)
    after = metrics(two_workers)
    assert after["chatglm_ready"] == 2
    assert (
        after["chatglm_time_to_first_token_seconds_count"] - before.get("chatglm_time_to_first_token_seconds_count", 0)
        == 8
    )
    assert after["chatglm_num_requests_running"] == after["chatglm_kv_cache_used_tokens"] == 0
    assert len(after) - len(before) < 200
    assert not any("random-" in name for name in after)


def test_the_log_is_json_without_prompts_and_keys(two_workers: Server) -> None:
    chat(two_workers, max_tokens=4)
    chat(two_workers, temperature=9)
    until(lambda: '"status": 400' in two_workers.log.read_text(encoding="utf-8"))
    log = two_workers.log.read_text(encoding="utf-8")
    assert MARKER not in log
    assert KEY not in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    answered = [line for line in lines if line["path"] == "/v1/chat/completions" and line["status"] == 200]
    assert answered[-1]["client"] == "operator"
    assert answered[-1]["completion_tokens"] == 4


def test_limits_of_bodies_hold_for_bentomls_route_and_health_is_answered_meanwhile(two_workers: Server) -> None:
    def post(content: bytes, **headers: str) -> requests.Response:
        given = {**HEADERS, "content-type": "application/json", **headers}
        return requests.post(f"{two_workers.url}/generate", data=content, headers=given, timeout=60)

    assert post(b"x" * 20_000_000).status_code == 413
    assert post(b'{"prompt":"a","system":' + b"[" * 2000 + b"]" * 2000 + b"}").json()["error"]["code"] == "invalid_json"
    assert post(b'{"prompt":[' + b"{}," * 100_000 + b"{}]}").status_code == 400
    assert post(b"{}", **{"content-encoding": "gzip"}).status_code == 415
    too_long = post(json.dumps({"prompt": f"{MARKER} " * 200_000}).encode())
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")
    wrong = post(json.dumps({"prompt": "x", "temperature": 9}).encode())
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "invalid_request_error")
    answer = post(json.dumps({"prompt": "你好", "max_tokens": 4}).encode())
    assert answer.status_code == 200
    assert not answer.text.startswith("{")
    no_prompt = post(json.dumps({"prompt": [MARKER]}).encode())
    assert no_prompt.status_code == 400  # BentoML's own answer; the exception in its log would quote the value
    until(lambda: "ValidationError" in two_workers.log.read_text(encoding="utf-8"))
    assert MARKER not in two_workers.log.read_text(encoding="utf-8")


def test_lines_of_all_loggers_reach_the_log(two_workers: Server) -> None:
    """BentoML's root logger drops INFO lines; a change of the key file is one."""
    keys = two_workers.log.parent / "keys"
    keys.write_text(keys.read_text() + "# the same keys\n")
    until(
        lambda: (
            chat(two_workers, max_tokens=1).ok
            and "1 API keys are in use" in two_workers.log.read_text(encoding="utf-8")
        )
    )


def test_a_killed_worker_is_replaced_and_its_gauges_are_deleted(two_workers: Server) -> None:
    workers = psutil.Process(two_workers.process.pid).children()
    stream = chat(two_workers, stream=True, ignore_eos=True, max_tokens=4000)
    next(stream.iter_lines())
    for worker in workers:
        worker.kill()
    time.sleep(1)
    wait_until_ready(two_workers)
    until(lambda: metrics(two_workers).get("chatglm_ready") == 2, 60)
    assert metrics(two_workers)["bentoml_service_request_in_progress"] <= 1
    assert chat(two_workers, max_tokens=4).status_code == 200


def test_a_stopped_worker_continues_where_it_was_and_sigterm_lets_its_streams_finish(tmp_path: Path) -> None:
    """SIGSTOP for longer than a step may take: afterwards it must neither be treated as hung nor have lost anything."""
    with serving(tmp_path, {"CHATGLM_STEP_SECONDS": "2", "CHATGLM_GRACE_SECONDS": "120"}) as server:
        stream = chat(server, stream=True, ignore_eos=True, max_tokens=100)
        lines = stream.iter_lines()
        next(lines)
        (worker,) = psutil.Process(server.process.pid).children()
        worker.suspend()
        with pytest.raises(requests.Timeout):
            requests.get(f"{server.url}/readyz", timeout=1)
        time.sleep(2)
        worker.resume()
        assert [line for line in lines if line][-1] == b"data: [DONE]"
        assert requests.get(f"{server.url}/readyz", timeout=10).status_code == 200
        assert requests.get(f"{server.url}/livez", timeout=10).status_code == 200
        _sigterm_refuses_new_requests_and_lets_the_stream_finish(server)


def _sigterm_refuses_new_requests_and_lets_the_stream_finish(server: Server) -> None:
    stream = chat(server, stream=True, ignore_eos=True, max_tokens=200)
    lines = stream.iter_lines()
    next(lines)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: requests.get(f"{server.url}/readyz", timeout=5).status_code == 503, 5)
    assert requests.get(f"{server.url}/livez", timeout=5).status_code == 200
    late = chat(server)
    assert late.status_code == 503
    assert late.json()["error"]["code"] == "server_unavailable"
    assert int(late.headers["retry-after"]) > 0
    assert [line for line in lines if line][-1] == b"data: [DONE]"
    assert server.process.wait(30) == 0


def test_after_the_grace_period_streams_get_an_error_and_the_server_ends(tmp_path: Path) -> None:
    with serving(tmp_path, {"CHATGLM_GRACE_SECONDS": "1"}) as server:
        stream = chat(server, stream=True, ignore_eos=True, max_tokens=8000, n=4)
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "server_unavailable"
        assert server.process.wait(30) == 0


def test_a_second_signal_ends_at_once(two_workers: Server) -> None:
    stream = chat(two_workers, stream=True, ignore_eos=True, max_tokens=8000, n=4)
    reading = threading.Thread(target=lambda: _read_all(stream), daemon=True)
    reading.start()
    two_workers.process.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert two_workers.process.poll() is None
    two_workers.process.send_signal(signal.SIGTERM)
    assert two_workers.process.wait(30) == 0  # of a grace period of 600 s


def _read_all(stream: requests.Response) -> None:
    try:
        for _ in stream.iter_lines():
            pass
    except requests.RequestException:
        pass  # it is cut off


def test_keys_that_cannot_be_read_stop_the_service_with_a_line_that_does_not_quote_them(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="ended early"),
        serving(tmp_path, {"CHATGLM_API_KEYS": "sk-secret two names here"}),
    ):
        pass
    (log,) = tmp_path.glob("serve-*.log")
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) == 1
    assert re.match(r"chatglm: CHATGLM_API_KEYS: key 1: expected", lines[0])
    assert "sk-secret" not in lines[0]


def test_a_model_that_could_not_be_loaded_is_a_503_with_the_reason_on_every_route(tmp_path: Path) -> None:
    with serving(tmp_path, {"CHATGLM_DEVICE": "cuda:77"}, wait=False) as server:
        until(lambda: "could not be loaded" in server.log.read_text(encoding="utf-8"), 120)
        question = {"prompt": f"你好 {MARKER}"}
        for path in ("/generate", "/v1/chat/completions"):
            body = (
                question
                if path == "/generate"
                else {"model": "chatglm", "messages": [{"role": "user", "content": "x"}]}
            )
            reply = requests.post(server.url + path, json=body, timeout=30)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_load_failed"), path
            assert reply.headers["content-type"] == "application/json"
        assert requests.get(f"{server.url}/livez", timeout=30).status_code == 503
