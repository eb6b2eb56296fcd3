"""The examples run as they stand, but for the address of the server, and are short."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models.demo.corpus import SAMPLE_ANSWER, answer_to
from tests.e2e.server import Server
from tests.golden_data import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
DOCUMENTED_URL = "http://localhost:8000"
POEM = answer_to(["背一首静夜思"])


def run(source: str, server: Server, *arguments: str, given: str = "") -> str:
    """What a program prints."""
    result = subprocess.run(
        [sys.executable, "-c", source.replace(DOCUMENTED_URL, server.url), *arguments],
        capture_output=True,
        input=given,
        timeout=240,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def example(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("stream.py", re.escape(POEM) + r"\n\[\d+ tokens in, \d+ out\]\n"),
        ("structured_output.py", r"name='(spring|summer|autumn|winter)' is_cold=(True|False)\n"),
        ("tools.py", r"get_weather\({'city': '(北京|上海)'}\) -> .+\n.*"),
        ("embeddings.py", r" 1\.000  今天天气真好\n -?\s?\d\.\d{3}  今天是个大晴天\n.*"),
        ("async_load.py", r"16 answers, \d+ tokens in [\d.]+ s: \d+ tokens/s\n"),
    ],
)
def test_an_example_does_what_it_says(name: str, printed: str, server: Server) -> None:
    assert re.fullmatch(printed, run(example(name), server), flags=re.DOTALL)


def test_langchain_streams_the_sample_answer(server: Server) -> None:
    pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    assert run(example("langchain_chat.py"), server) == SAMPLE_ANSWER


def test_the_terminal_chat_remembers_and_forgets(server: Server) -> None:
    questions = "my name is Alice\nwhat is my name\n/new\nwhat is my name\n"
    printed = run(example("chat.py"), server, given=questions)
    lines = [line.removeprefix("> ").removeprefix("> ") for line in printed.splitlines()[1:]]
    assert [line for line in lines if line] == ["Noted, Alice!", "Your name is Alice.", "Tell me your name first."]


def test_the_terminal_chat_answers_one_question(server: Server) -> None:
    assert run(example("chat.py"), server, "--system", "You are a helpful assistant.", "hello").startswith("Hello")


def test_the_notebook_runs_from_top_to_bottom(server: Server) -> None:
    notebook = json.loads(example("notebook.ipynb"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    printed = run("\n".join(code), server)
    assert printed.startswith(SAMPLE_ANSWER)
    assert printed.count("[(") == 3
