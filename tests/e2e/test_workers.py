"""Several worker processes: limits and metrics are shared, models and GPUs are not."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests
import torch
from openai import OpenAI

from models.demo.corpus import SAMPLE_ANSWER
from serving.engine.native.device import choose_device
from serving.settings import Settings, SettingsError
from tests.e2e.server import Server, serving, wait_until_ready


def test_two_workers_serve_and_are_counted_together(tmp_path: Path) -> None:
    settings = {"CHATGLM_WORKERS": "2", "CHATGLM_KV_CACHE_GIB": "0.01"}
    with serving(tmp_path, settings) as server:

        def ask(_: int) -> str:
            # a connection each: the kernel distributes them over the workers
            client = OpenAI(base_url=server.base_url, api_key="none")
            answer = client.chat.completions.create(model="chatglm", messages=[{"role": "user", "content": "你好"}])
            return answer.choices[0].message.content or ""

        wait_until_ready(server)
        while server.log.read_text(encoding="utf-8").count("is ready at") < 2:
            assert server.process.poll() is None
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, range(24))) == {SAMPLE_ANSWER}
        log = server.log.read_text(encoding="utf-8")
        assert set(re.findall(r":(\d)\] chatglm2: [\d,]+ parameters", log)) == {"1", "2"}
        wanted = {"chatglm_request_success_total": 24, "chatglm_ready": 2}
        for _ in range(100):
            seen = {name: server.metrics().get(name) for name in wanted}
            if seen == wanted:
                break
        assert seen == wanted
        assert server.metrics()["chatglm_kv_cache_tokens"] % 2 == 0


def test_two_servers_of_one_home_keep_their_own_counts(tmp_path: Path) -> None:
    with serving(tmp_path) as first:
        assert ask(first, "any").status_code == 200
        before = first.metrics()["chatglm_request_success_total"]
        with serving(tmp_path) as second:
            assert second.metrics().get("chatglm_request_success_total", 0) == 0
            assert ask(second, "any").status_code == 200
            assert first.metrics()["chatglm_request_success_total"] == before == 1
            assert first.metrics()["chatglm_ready"] == second.metrics()["chatglm_ready"] == 1


def ask(server: Server, key: str, **fields: object) -> requests.Response:
    """On a connection of its own, which the kernel gives to one of the workers."""
    return requests.post(
        f"{server.base_url}/chat/completions",
        json={"model": "chatglm", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 4, **fields},
        headers={"authorization": f"Bearer {key}", "connection": "close"},
        stream=bool(fields.get("stream")),
        timeout=60,
    )


def begin_stream(server: Server, key: str) -> tuple[int, Iterator[bytes]]:
    """The status, and the lines after the first; dropping them closes the connection."""
    reply = ask(server, key, stream=True, ignore_eos=True, max_tokens=4000)
    lines: Iterator[bytes] = reply.iter_lines()
    next(lines)
    return reply.status_code, lines


def test_limits_apply_over_all_workers_and_a_killed_one_uses_none_of_them(tmp_path: Path) -> None:
    settings = {
        "CHATGLM_WORKERS": "2",
        "CHATGLM_API_KEYS": "sk-minute minute,sk-at-once at-once",
        "CHATGLM_CLIENT_MAX_CONCURRENT": "3",
        "CHATGLM_CLIENT_REQUESTS_PER_MINUTE": "20",
        "CHATGLM_ACCESS_LOG": "json",
    }
    with serving(tmp_path, settings) as server:
        while server.log.read_text(encoding="utf-8").count("is ready at") < 2:
            assert server.process.poll() is None
            time.sleep(0.1)
        assert Counter(ask(server, "sk-minute").status_code for _ in range(24)) == {200: 20, 429: 4}

        streams = [begin_stream(server, "sk-at-once") for _ in range(8)]
        assert Counter(status for status, _ in streams) == {200: 3, 429: 5}
        for worker in psutil.Process(server.process.pid).children():
            worker.kill()
        deadline = time.monotonic() + 60
        while (status := answer_or_none(server)) != 200:
            assert time.monotonic() < deadline, status
            time.sleep(0.2)


def answer_or_none(server: Server) -> int | None:
    try:
        return ask(server, "sk-at-once").status_code
    except requests.RequestException:
        return None  # no worker is listening yet


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("setting", ["auto", "cuda"])
def test_each_worker_takes_a_gpu_of_its_own(setting: str) -> None:
    assert [choose_device(setting, worker).index for worker in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="worker 3 has no GPU: there are 2"):
        choose_device(setting, 2)


@pytest.mark.usefixtures("two_gpus")
def test_a_named_gpu_is_every_workers() -> None:
    assert [choose_device("cuda:1", worker).index for worker in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"GPUS_PER_WORKER": "2"},
            "CHATGLM_GPUS_PER_WORKER above 1 requires CHATGLM_ENGINE=vllm",
        ),
        ({"VLLM_OPTIONS": "{}"}, "CHATGLM_VLLM_OPTIONS requires CHATGLM_ENGINE=vllm"),
        ({"ENGINE": "vllm", "VLLM_OPTIONS": "[1]"}, "CHATGLM_VLLM_OPTIONS is not a JSON object"),
        ({"ENGINE": "vllm", "PRECISION": "int4"}, "CHATGLM_PRECISION=int4 is not supported by CHATGLM_ENGINE=vllm"),
    ],
)
def test_options_of_the_other_engine_are_refused_in_one_line(values: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(sentence)):
        Settings.from_environment({f"CHATGLM_{name}": value for name, value in values.items()})


def test_workers_on_vllm_see_only_their_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.engine.vllm.start import CannotStart, take_devices

    settings = Settings(engine="vllm", workers=2, gpus_per_worker=2)
    seen = []
    for worker in range(2):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
        take_devices(worker, settings)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["4,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(CannotStart, match="worker 2 needs 2 GPUs of its own, and only 3 are visible"):
        take_devices(1, settings)
