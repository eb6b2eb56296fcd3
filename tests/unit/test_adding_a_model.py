"""docs/adding-a-model.md works as it is written: its code, its test and its commands are executed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden_data import REPOSITORY

PAGE = (REPOSITORY / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
MAX_LINES = 80  # that are not blank, so that a family is one short file


def block(language: str, heading: str) -> str:
    """The first code block of a language after a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(rf"^```{language}\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    assert found, heading
    return found[1]


def edited(text: str, diff: str) -> str:
    """`text` after the diff; every run of removed lines must occur exactly once."""
    for removed, added in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, flags=re.MULTILINE):
        old, new = (re.sub(r"^[-+]", "", part, flags=re.MULTILINE) for part in (removed, added))
        assert text.count(old) == 1, f"models/families/__init__.py no longer has {old!r}"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of models/ with the changes of the page."""
    root = tmp_path_factory.mktemp("tree")
    shutil.copytree(REPOSITORY / "models", root / "models", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "models" / "families" / "letters.py").write_text(block("python", "1. The file"), encoding="utf-8")
    init = root / "models" / "families" / "__init__.py"
    init.write_text(edited(init.read_text(encoding="utf-8"), block("diff", "2. The line")), encoding="utf-8")
    (root / "test_letters.py").write_text(block("python", "3. The test"), encoding="utf-8")
    return root


def run(tree: Path, *command: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": f"{tree}{os.pathsep}{REPOSITORY}",
        "BENTOML_HOME": str(tree / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "true",
        "COLUMNS": "200",
    }
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_file_is_short_and_clean(tree: Path) -> None:
    assert sum(map(bool, block("python", "1. The file").splitlines())) <= MAX_LINES
    config = ["--config", str(REPOSITORY / "pyproject.toml")]
    written = [str(tree / "models" / "families" / "letters.py"), str(tree / "test_letters.py")]
    run(tree, sys.executable, "-m", "ruff", "check", *config, *written)
    run(tree, sys.executable, "-m", "ruff", "format", "--check", *config, *written)


def test_the_test_of_the_page_passes(tree: Path) -> None:
    arguments = ["-q", "-c", str(REPOSITORY / "pyproject.toml"), "--rootdir", str(tree), "test_letters.py"]
    assert "1 passed" in run(tree, sys.executable, "-m", "pytest", "-v", *arguments[1:])


def test_the_commands_of_the_page_put_the_model_into_the_store(tree: Path) -> None:
    commands = block("bash", "4. In use").replace(".venv/bin/python", sys.executable)
    assert re.search(r"alphabet:\S+\s+letters", run(tree, "bash", "-ec", commands))
