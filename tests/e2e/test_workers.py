"""Several worker processes, one copy of the model each: what they share, and that each takes its own device."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
from openai import OpenAI

from models.demo.corpus import SAMPLE_ANSWER
from serving.engine.device import choose_device
from serving.settings import Settings, SettingsError
from tests.e2e.server import Server, serving, wait_until_ready


def gauge(server: Server, name: str) -> float:
    lines = requests.get(f"{server.url}/metrics", timeout=10).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def test_two_workers_serve_and_are_counted_together(tmp_path: Path) -> None:
    settings = {"CHATGLM_WORKERS": "2", "CHATGLM_THREADS": "1", "CHATGLM_KV_CACHE_GIB": "0.01"}
    with serving(tmp_path, settings) as server:

        def ask(_: int) -> str:
            # a connection each: the kernel gives them to whichever worker is free
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
            seen = {name: gauge(server, name) for name in wanted}
            if seen == wanted:
                break
        assert seen == wanted
        assert gauge(server, "chatglm_kv_cache_tokens") % 2 == 0


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
        ({"GPUS_PER_WORKER": "2"}, "CHATGLM_GPUS_PER_WORKER above 1 needs CHATGLM_ENGINE=vllm"),
        ({"VLLM_OPTIONS": "{}"}, "CHATGLM_VLLM_OPTIONS needs CHATGLM_ENGINE=vllm"),
        ({"ENGINE": "vllm", "VLLM_OPTIONS": "[1]"}, "CHATGLM_VLLM_OPTIONS is not a JSON object"),
        ({"ENGINE": "vllm", "PRECISION": "int4"}, "CHATGLM_PRECISION=int4 is not for CHATGLM_ENGINE=vllm"),
    ],
)
def test_what_only_the_other_engine_has_is_refused_in_one_line(values: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(sentence)):
        Settings.from_environment({f"CHATGLM_{name}": value for name, value in values.items()})


def test_workers_on_vllm_see_only_their_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.start_vllm import CannotStart, take_devices

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
