"""The service from start to end: invalid settings, the built Bento, readiness, a client that disconnects, SIGTERM."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import requests
from openai import OpenAI

from models.demo.corpus import SAMPLE_ANSWER
from tests.e2e.server import BENTOML, Server, environment, free_port, serving, wait_until_ready
from tests.golden_data import REPOSITORY


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"CHATGLM_MODEL": "chatglm9:none"}, "chatglm9:none"),
        ({"CHATGLM_MAX_SEQUENCES": "many"}, "CHATGLM_MAX_SEQUENCES"),
        ({"CHATGLM_MODLE": "x"}, "CHATGLM_MODLE is not a setting: did you mean CHATGLM_MODEL?"),
        ({"CHATGLM_PORT": "9000"}, "CHATGLM_PORT is not a setting"),
    ],
)
def test_a_wrong_setting_is_one_clear_line_and_exit_code_1(
    settings: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    result = subprocess.run(
        [*BENTOML, "serve", "--host", "127.0.0.1", "--port", str(free_port())],
        cwd=REPOSITORY,
        env=environment(tmp_path, settings),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert sentence in lines[0]


def test_a_port_that_is_taken_is_one_clear_line_and_exit_code_1(server: Server, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    result = subprocess.run(
        [*BENTOML, "serve", "--host", "127.0.0.1", "--port", port],
        cwd=REPOSITORY,
        env=environment(tmp_path),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    (line,) = (line for line in (result.stdout + result.stderr).splitlines() if line.strip())
    assert line.startswith(f"chatglm: port {port} on 127.0.0.1 is taken")


def test_the_log_says_where_the_server_answers_and_for_whom(server: Server) -> None:
    log = server.log.read_text(encoding="utf-8")
    assert f"is ready at {server.url}/v1" in log
    assert f"chat page  {server.url}/chat" in log
    assert "this machine only (loopback); no API key is needed" in log


def test_a_model_that_cannot_be_loaded_ends_the_server_with_exit_code_1_if_asked(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert server.process.poll() is None
    (weights,) = (tmp_path / "models" / "chatglm2-demo").glob("*/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with serving(tmp_path, {"CHATGLM_EXIT_ON_FAILED_LOAD": "true"}, wait=False) as server:
        assert server.process.wait(60) == 1
    assert "could not be loaded" in server.log.read_text(encoding="utf-8")


def test_the_bento_is_built_and_serves(tmp_path: Path) -> None:
    built = subprocess.run(
        [*BENTOML, "build", "--output", "tag"],
        cwd=REPOSITORY,
        env=environment(tmp_path),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (described,) = tmp_path.glob("bentos/chatglm2/*/apis/openapi.yaml")
    assert "/v1/chat/completions:" in described.read_text(encoding="utf-8")
    (source,) = tmp_path.glob("bentos/chatglm2/*/src")
    files = {file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()}
    assert {"web/page/chat.html", "web/page/vendor/markdown.js", "kernels/linears.py", "service.py"} <= files
    assert not [file for file in files if file.startswith(("tests/", "docs/")) or file.rpartition("/")[0] == "web"]
    with serving(tmp_path, {"CHATGLM_THREADS": "0"}, target="chatglm2:latest") as server:  # as many as there are cores
        client = OpenAI(base_url=server.base_url, api_key="none")
        answer = client.chat.completions.create(model="chatglm2-6b", messages=[{"role": "user", "content": "你好"}])
        assert answer.choices[0].message.content == SAMPLE_ANSWER
        for path in ("/", "/chat", "/page/app.js", "/page/vendor/markdown.js", "/static_content/swagger-ui.css"):
            assert requests.get(server.url + path, timeout=10).status_code == 200, path


def test_settings_choose_names_and_precision_and_the_log_states_them(tmp_path: Path) -> None:
    settings = {"CHATGLM_ALIASES": "gpt-3.5-turbo", "CHATGLM_PRECISION": "bfloat16", "CHATGLM_THREADS": "1"}
    with serving(tmp_path, settings) as server:
        client = OpenAI(base_url=server.base_url, api_key="none")
        assert [model.id for model in client.models.list()] == ["chatglm2-demo", "gpt-3.5-turbo"]
        answer = client.chat.completions.create(
            model="gpt-3.5-turbo", messages=[{"role": "user", "content": "你好"}], temperature=0
        )
        assert answer.choices[0].message.content == SAMPLE_ANSWER
        log = server.log.read_text(encoding="utf-8")
        assert re.search(r"chatglm2: [\d,]+ parameters in bfloat16 on cpu \(1 threads\)", log)


def test_it_is_not_ready_until_the_model_is_loaded_and_sigterm_lets_a_stream_finish(tmp_path: Path) -> None:
    with serving(tmp_path, wait=False) as server:
        seen: set[int] = set()
        deadline = time.monotonic() + 60
        while 200 not in seen and time.monotonic() < deadline:
            try:
                seen.add(requests.get(f"{server.url}/readyz", timeout=5).status_code)
            except requests.RequestException:
                time.sleep(0.05)
        assert seen == {200, 503}
        wait_until_ready(server)
        client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model="chatglm", messages=[{"role": "user", "content": "你好"}], stream=True, seed=1
        )
        first = next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        text = "".join(c.choices[0].delta.content or "" for c in [first, *stream])
        assert text == SAMPLE_ANSWER
        assert server.process.wait(30) == 0


def test_a_client_that_disconnects_ends_its_generation(server: Server) -> None:
    """`ignore_eos` would go on for thousands of tokens; after leaving, the process must come to rest."""
    body = {
        "model": "chatglm",
        "messages": [{"role": "user", "content": "你好"}],
        "ignore_eos": True,
        "max_tokens": 8000,
        "n": 8,
    }
    before = server.metrics()["chatglm_generation_tokens_total"]
    for stream in (True, False):
        with contextlib.suppress(requests.ReadTimeout), requests.Session() as session:
            url = f"{server.base_url}/chat/completions"
            reply = session.post(url, json={**body, "stream": stream}, stream=stream, timeout=1)
            assert next(reply.iter_lines()).startswith(b"data:")
    deadline = time.monotonic() + 30
    while _cpu_share(server, seconds=1.0) >= 0.3:
        assert time.monotonic() < deadline, "the server still computes"
    assert server.metrics()["chatglm_generation_tokens_total"] - before < 8000 * 8 / 2


def _cpu_share(server: Server, seconds: float) -> float:
    """CPU seconds used by the server's processes per second."""
    import psutil

    parent = psutil.Process(server.process.pid)
    processes = [parent, *parent.children(recursive=True)]
    before = sum(sum(p.cpu_times()[:2]) for p in processes)
    time.sleep(seconds)
    return (sum(sum(p.cpu_times()[:2]) for p in processes) - before) / seconds


def test_the_demo_ends_strings_that_a_schema_forces(server: Server) -> None:
    """Its weights once went on with a string until the answer's length cut it, whatever the schema."""
    client = OpenAI(base_url=server.base_url, api_key="none")
    text = {"type": "string"}
    event = {"name": text, "date": text, "participants": {"type": "array", "items": text}}
    for properties in ({"name": text}, event, {"name": text, "age": {"type": "integer"}, "city": text}):
        schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        for seed in range(3):
            answer = client.chat.completions.create(
                model="chatglm2-6b",
                messages=[{"role": "user", "content": "Alice and Bob go to a science fair on Friday."}],
                response_format={"type": "json_schema", "json_schema": {"name": "event", "schema": schema}},
                max_tokens=256,
                seed=seed,
            )
            assert answer.choices[0].finish_reason == "stop", answer.choices[0].message.content
            assert json.loads(answer.choices[0].message.content or "").keys() == properties.keys()
