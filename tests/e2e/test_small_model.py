"""`make serve MODEL=smollm2`: a trained model from a GGUF file answers, in every precision."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import requests

from tests.e2e.server import environment, serving
from tests.golden_data import REPOSITORY

pytestmark = pytest.mark.slow
QUESTION = {"role": "user", "content": "What is the capital of France? Answer in one sentence."}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Bento store with the model."""
    folder = tmp_path_factory.mktemp("home")
    done = subprocess.run(
        ["make", "smollm2"], cwd=REPOSITORY, env=environment(folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "smollm2:" in done.stdout
    return folder


@pytest.mark.parametrize("precision", ["auto", "int8", "int4"])
def test_a_small_model_knows_the_capital_of_france(home: Path, precision: str) -> None:
    settings = {"CHATGLM_MODEL": "smollm2", "CHATGLM_PRECISION": precision, "CHATGLM_KV_CACHE_GIB": "0.25"}
    with serving(home, settings | ({"CHATGLM_KV_PRECISION": "8"} if precision == "int8" else {})) as server:
        body = {"model": "smollm2", "messages": [QUESTION], "temperature": 0, "max_tokens": 40}
        said = requests.post(f"{server.base_url}/chat/completions", json=body, timeout=120).json()
    assert "Paris" in said["choices"][0]["message"]["content"]
    assert said["choices"][0]["finish_reason"] == "stop" or precision == "int4"


def test_a_second_time_nothing_is_fetched_and_a_broken_file_is_refused(home: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "smollm2"], cwd=REPOSITORY, env=environment(home), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "Fetching" not in done.stdout
    (tmp_path / "model.gguf").write_bytes(b"GGUF and then nothing")
    command = [sys.executable, "-m", "models.store", "import", "hf", "--from", str(tmp_path / "model.gguf")]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(home), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Error: transformers cannot read model.gguf" in done.stderr
    assert "Traceback" not in done.stderr
