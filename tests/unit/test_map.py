"""The source stays readable: small files and functions, each file introduced, and a request that enters few of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

from benchmarks.request_path import listing, request_path
from tests.golden_data import REPOSITORY

PYTHON_FOLDERS = ("serving", "models", "kernels", "tests", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_REQUEST_FILES = 38
# metaphors that stood for an interface, a registry, overload and "does not use": the field has words for them
HOUSE_WORDS = re.compile(r"\b(?:plugs?|shel(?:f|ves)|siege|Knows|knows no)\b")


def python_files() -> list[Path]:
    files = [path for folder in PYTHON_FOLDERS for path in (REPOSITORY / folder).rglob("*.py")]
    return sorted([*files, REPOSITORY / "service.py"])


def page_files() -> list[Path]:
    return sorted(
        path for suffix in ("js", "css", "html") for path in (REPOSITORY / "web" / "page").glob(f"*.{suffix}")
    )


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def num_lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_every_file_is_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in [*python_files(), *page_files()]}
    assert len(lengths) > 100
    assert {name_of(path): length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_every_function_is_short_and_every_file_begins_with_what_it_does() -> None:
    too_long, unexplained = [], []
    for path in python_files():
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        too_long += [
            f"{name_of(path)}:{node.lineno} {node.name} has {num_lines(node)} lines"
            for node in functions(tree)
            if num_lines(node) > MAX_FUNCTION_LINES
        ]
        if source.strip() and not (ast.get_docstring(tree, clean=False) or "").split("\n")[0].strip():
            unexplained.append(name_of(path))
    assert not too_long
    assert not unexplained


def test_the_words_are_those_of_the_field() -> None:
    folders = [REPOSITORY / name for name in ("serving", "models", "kernels", "docs")]
    files = [path for folder in folders for suffix in ("py", "md") for path in folder.rglob(f"*.{suffix}")]
    found = [
        f"{name_of(path)}:{number} {line.strip()}"
        for path in [*files, REPOSITORY / "service.py", REPOSITORY / "README.md"]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if HOUSE_WORDS.search(line)
    ]
    assert not found, "\n".join(found)


def test_a_streamed_chat_request_enters_few_files() -> None:
    files = request_path()
    for folder in ("serving/http", "serving/openai/chat", "serving/engine/native", "models/families"):
        assert any(path.startswith(f"{folder}/") for path in files), folder  # of both threads
    assert len(files) <= MAX_REQUEST_FILES, f"a streamed chat request enters {len(files)} files:\n{listing(files)}"


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports for type checkers count, too: a reader follows them."""
    graph = grimp.build_graph("serving", "models", "kernels", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 100
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the files of the circle
