"""The commands and programs of the README and of the user's pages work: each is run here, or by the test named here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from models.demo import CHECKPOINT
from models.demo.corpus import SAMPLE_ANSWER
from tests.e2e.server import Server, environment, serving
from tests.golden_data import REPOSITORY
from tests.unit.test_readme import CHINESE, PAIRS, README, blocks

BLOCKS = dict.fromkeys(block for page, _ in PAIRS for block in blocks(page))  # the Chinese pages have the same
BASH = "\n".join(code for language, code in BLOCKS if language == "bash")
COMMANDS = [line for line in BASH.replace("\\\n", "").splitlines() if line]
PYTHON_BLOCKS = [code for language, code in BLOCKS if language == "python"]
DOCUMENTED_URL = "http://localhost:8000"

TERMINAL_CHAT = ".venv/bin/python -m examples.chat 你好"
IMPORT = ".venv/bin/python -m models.store import chatglm2 --from /path/to/chatglm2-6b --name chatglm2-6b"
FETCH = ".venv/bin/python -m models.store import"
LIST = ".venv/bin/python -m models.store list"
SERVE_IMPORTED = "CHATGLM_MODEL=chatglm2-6b make serve"
QUANTIZE = ".venv/bin/python -m models.store quantize chatglm2-6b int8"
SERVE_QUANTIZED = "CHATGLM_MODEL=chatglm2-6b-int8 make serve"
LOAD_HELP = ".venv/bin/python -m benchmarks.load --help"
RUN_HERE = {TERMINAL_CHAT, IMPORT, LIST, SERVE_IMPORTED, QUANTIZE, SERVE_QUANTIZED}
RUN_ELSEWHERE = {
    "make serve": "tests/e2e/server.py::serving",
    "make serve MODEL=smollm2": "tests/e2e/test_small_model.py::make",
    "make serve MODELS=chatglm2-demo,minilm": "tests/e2e/test_several_models.py::CHATGLM_MODELS",
    "CHATGLM_MODELS=chatglm2-6b,qwen,minilm make serve": "tests/e2e/test_several_models.py::CHATGLM_MODELS",
    f"{FETCH} chatglm2 THUDM/chatglm2-6b": "tests/unit/test_hub.py::THUDM/chatglm2-demo",
    f"{FETCH} chatglm2 modelscope:ZhipuAI/chatglm2-6b": "tests/unit/test_hub.py::modelscope:THUDM/chatglm2-demo",
    f"{FETCH} embedding BAAI/bge-large-zh-v1.5": "tests/e2e/test_several_models.py::import_model",
    f"{FETCH} reranker BAAI/bge-reranker-base": "tests/e2e/test_several_models.py::import_model",
    "make test": ".ci/run::make test",
    "make setup": "Makefile::test-setup",
    ".venv/bin/bentoml build": "tests/e2e/test_service.py::test_the_bento_is_built_and_serves",
    ".venv/bin/bentoml serve chatglm2:latest": "tests/e2e/test_service.py::test_the_bento_is_built_and_serves",
    "make container": "deploy/container/test.sh::build.sh",
}


def run(command: list[str], home: Path | None = None) -> str:
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment(home) if home else {**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def words(command: str) -> list[str]:
    return [sys.executable if word == ".venv/bin/python" else word for word in command.split()]


def test_every_command_is_run_by_a_test() -> None:
    others = [command for command in COMMANDS if not command.startswith("curl ")]
    assert set(others) == RUN_HERE | RUN_ELSEWHERE.keys()
    for test in RUN_ELSEWHERE.values():
        file, _, text = test.partition("::")
        assert text in (REPOSITORY / file).read_text(encoding="utf-8"), test


@pytest.mark.parametrize("readme", [README, CHINESE], ids=["English", "Chinese"])
def test_every_make_target_that_is_named_exists(readme: Path) -> None:
    targets = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", readme.read_text(encoding="utf-8"), re.MULTILINE))
    assert {"serve", "test"} <= targets
    rules = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert [target for target in targets if not re.search(rf"^{target}:", rules, re.MULTILINE)] == []


def test_curl_gets_the_sample_answer(server: Server) -> None:
    (command,) = re.findall(r"curl \S*/chat/completions .*?'$", BASH, flags=re.DOTALL | re.MULTILINE)
    printed = run(["bash", "-c", command.replace(DOCUMENTED_URL, server.url)])
    assert SAMPLE_ANSWER in printed


def test_every_python_program_is_a_tested_example_or_runs(server: Server) -> None:
    sources = [path.read_text(encoding="utf-8") for path in (REPOSITORY / "examples").glob("*.py")]
    tested = {*sources, *(source.partition('"""\n\n')[2] for source in sources)}
    tools, native = (code for code in PYTHON_BLOCKS if code not in tested)
    assert run([sys.executable, "-c", native.replace(DOCUMENTED_URL, server.url)]) == SAMPLE_ANSWER
    call = run([sys.executable, "-c", tools.replace(DOCUMENTED_URL, server.url)])
    assert re.search(r"(北京|上海).*name='get_weather'", call)


def test_the_terminal_chat_answers(server: Server) -> None:
    assert run([*words(TERMINAL_CHAT), "--url", server.base_url]) == f"{SAMPLE_ANSWER}\n"


def test_a_checkpoint_is_imported_listed_and_served(tmp_path: Path) -> None:
    """The demonstration model's folder has the format of the real one."""
    run(words(IMPORT.replace("/path/to/chatglm2-6b", str(CHECKPOINT))), tmp_path)
    assert "chatglm2-6b:" in run(words(LIST), tmp_path)
    run(words(QUANTIZE), tmp_path)
    for command, name in ((SERVE_IMPORTED, "chatglm2-6b"), (SERVE_QUANTIZED, "chatglm2-6b-int8")):
        setting, _, rest = command.partition(" ")
        assert rest == "make serve"
        with serving(tmp_path, dict([setting.split("=")])) as server:
            listed = requests.get(f"{server.base_url}/models", timeout=30).json()
            assert listed["data"][0]["id"] == name
            body = {"model": name, "messages": [{"role": "user", "content": "你好"}], "temperature": 0}
            said = requests.post(f"{server.base_url}/chat/completions", json=body, timeout=60).json()
            assert said["choices"][0]["message"]["content"] == SAMPLE_ANSWER


def test_the_load_test_has_a_help_text() -> None:
    assert "--concurrency" in run(words(LOAD_HELP))
