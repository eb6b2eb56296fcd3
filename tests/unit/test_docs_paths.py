"""Every repository path and every `python -m` command that the documents and deployment files name exists."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.golden_data import REPOSITORY

HYPOTHETICAL = ("docs/adding-a-model.md",)  # its files are written by tests/unit/test_adding_a_model.py
PLACEHOLDERS = r"\b(?:FILE|DATE)\b"
MODULE_ROOTS = "benchmarks|examples|models|tests"


def tracked(*patterns: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (REPOSITORY / name).exists()]


TOP_LEVEL = sorted({name.split("/")[0] for name in tracked()})
DOCUMENTS = [
    name
    for name in (
        *tracked("*.md", "Makefile", "mkdocs.yml", "bentofile*.yaml", "deploy"),
        "docs/images/architecture.svg",
    )
    if name not in HYPOTHETICAL and not name.endswith("dashboard.json")
]
PATH = re.compile(rf"(?<![\w./-])((?:{'|'.join(map(re.escape, TOP_LEVEL))})/[\w./*-]*[\w*/])")


def paths(text: str) -> list[str]:
    """Of the words that begin with a folder of the repository, those that are paths: globs for placeholders."""
    return [re.sub(PLACEHOLDERS, "*", path) for path in PATH.findall(text)]


def exists(path: str) -> bool:
    return any(REPOSITORY.glob(path)) if "*" in path else (REPOSITORY / path).exists()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_and_module_in_a_document_exists(name: str) -> None:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    missing = [path for path in paths(text) if not exists(path)]
    for module in re.findall(rf"python -m ((?:{MODULE_ROOTS})[\w.]*\w)", text):
        path = REPOSITORY / module.replace(".", "/")
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            missing.append(module)
    assert missing == []


def test_the_architecture_page_names_files() -> None:
    """So that the test above cannot pass because of a pattern that finds nothing."""
    named = paths((REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert {"serving/generation/pipeline.py", "serving/engine/native/scheduler.py"} <= set(named)
    assert len(set(named)) > 30
