"""The documented clients, unmodified, print the documented answer and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import requests
from openai import OpenAI

from models.demo.corpus import SAMPLE_ANSWER
from tests.e2e.server import Server
from tests.golden_data import REPOSITORY

OPENAI_0_28 = REPOSITORY / ".venv-openai-0.28" / "bin" / "python"
DOCUMENTED_URL = "http://localhost:8000"


def run_client(python: Path | str, name: str, server: Server) -> str:
    """Run an example as it stands, but for the address of the server."""
    source = (REPOSITORY / "examples" / name).read_text(encoding="utf-8")
    assert DOCUMENTED_URL in source
    result = subprocess.run(
        [str(python), "-c", source.replace(DOCUMENTED_URL, server.url)],
        capture_output=True,
        timeout=120,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not OPENAI_0_28.exists(), reason="run `make test-setup`: openai 0.28 needs its own environment")
def test_openai_0_28_prints_the_sample_answer(server: Server) -> None:
    assert run_client(OPENAI_0_28, "client_openai_0_28.py", server) == SAMPLE_ANSWER


@pytest.mark.parametrize("name", ["client_openai.py", "client_requests.py"])
def test_todays_clients_print_the_sample_answer(name: str, server: Server) -> None:
    assert run_client(sys.executable, name, server) == SAMPLE_ANSWER


def test_the_documented_answer_has_the_documented_fields(server: Server) -> None:
    body = requests.post(
        f"{server.base_url}/chat/completions",
        json={"model": "chatglm2-6b", "messages": [{"role": "user", "content": "你好"}]},
        timeout=60,
    ).json()
    assert body["model"] == "chatglm2-6b"
    assert body["object"] == "chat.completion"
    assert isinstance(body["created"], int)
    (choice,) = body["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == SAMPLE_ANSWER
    assert choice["finish_reason"] == "stop"


def test_every_name_and_both_prefixes_answer(server: Server) -> None:
    for base in (server.base_url, server.url):
        client = OpenAI(base_url=base, api_key="none")
        names = [model.id for model in client.models.list()]
        assert {"chatglm2-demo", "chatglm2-6b", "chatglm"} <= set(names)
        for name in names:
            answer = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "你好"}], temperature=0
            )
            assert answer.choices[0].message.content == SAMPLE_ANSWER
            assert answer.model == name


def test_bentomls_own_client_streams_the_same_text(server: Server) -> None:
    import bentoml

    with bentoml.SyncHTTPClient(server.url) as client:
        assert "".join(client.generate(prompt="你好")) == SAMPLE_ANSWER


def test_a_second_round_goes_on(server: Server) -> None:
    client = OpenAI(base_url=server.base_url, api_key="none")
    answer = client.chat.completions.create(
        model="chatglm2-6b",
        messages=[
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": SAMPLE_ANSWER},
            {"role": "user", "content": "你好"},
        ],
    )
    assert answer.choices[0].message.content == SAMPLE_ANSWER


def test_health_and_unknown_paths(server: Server) -> None:
    assert requests.get(f"{server.url}/livez", timeout=10).status_code == 200
    assert requests.get(f"{server.url}/readyz", timeout=10).status_code == 200
    unknown = [("GET", "/v1/nothing", 404), ("PUT", "/v1/models", 405), ("GET", "/v1", 404), ("GET", "/v1/a%0Ab", 404)]
    for method, path, status in unknown:
        reply = requests.request(method, server.url + path, timeout=10)
        assert reply.status_code == status
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
