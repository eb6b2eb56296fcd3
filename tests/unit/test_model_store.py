"""A model is stored whole or not at all, and is found with its family."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints.files import link_or_copy, require_space
from models.families import FAMILIES
from models.family import ImportRefused
from models.store.command_line import main
from models.store.progress import ProgressPrinter, describe, no_progress, readable_bytes
from models.store.staging import move_folder, staging_folder
from tests.golden_data import REPOSITORY
from tests.original_glm import SMALL, random_weights, write_checkpoint
from tests.own_store import own_store


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "bentoml"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint", SMALL, random_weights(SMALL, 1), shards=2)
    return tmp_path / "checkpoint"


def environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "BENTOML_HOME": str(home),
        "BENTOML_DO_NOT_TRACK": "true",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }


def store(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, without a process of its own."""
    output, errors = io.StringIO(), io.StringIO()
    with own_store(home), redirect_stdout(output), redirect_stderr(errors):
        code = main(arguments)
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def run_in_process(home: Path, code: str) -> Any:
    """Run lines of code in their own process and return what they assign to `answer`."""
    script = (
        f"import json, sys\nfrom models.store import model_store as store\n{code}\nprint('ANSWER', json.dumps(answer))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(home), capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout.rpartition("ANSWER")[2])


def everything_in(home: Path) -> list[str]:
    """Every file of an import, finished or not. BentoML makes empty folders of its own."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() or "importing" in str(path))


def test_an_imported_model_is_listed_found_and_loaded_with_its_family(home: Path, checkpoint: Path) -> None:
    done = store(home, "import", "chatglm2", "--from", str(checkpoint), "--name", "tiny:v1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny:v1 is in the model store")
    assert re.search(r"100%.* of .* kB", done.stderr)
    folder = home / "models" / "tiny" / "v1"
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "model.yaml", "tokenizer.model"}
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert everything_in(home) == sorted([f"models/tiny/v1/{name}" for name in names] + ["models/tiny/latest"])

    listed = store(home, "list")
    assert listed.returncode == 0
    row = listed.stdout.splitlines()[1]
    assert re.fullmatch(r"tiny:v1 +chatglm2 +float32 +\S+ kB +128 +\d{4}-\d\d-\d\d \d\d:\d\d", row), row

    answer = run_in_process(
        home,
        "import torch\n"
        "found = store.resolve('tiny')\n"
        "family = store.FAMILIES[found.family]\n"
        "loaded = family.load(found.path, found.metadata, torch.device('cpu'), 'float32', store.no_progress)\n"
        "network, chat = loaded.network, loaded.chat_format\n"
        "answer = [found.tag, found.family, found.metadata['source'], network.shape.max_positions,"
        " network.shape.num_tokens == chat.num_tokens, chat.decode(chat.encode('你好'))]",
    )
    assert answer == ["tiny:v1", "chatglm2", "checkpoint", 128, True, "你好"]


def test_the_newest_import_is_the_latest_and_a_tag_is_taken_once(home: Path, checkpoint: Path) -> None:
    assert store(home, "import", "chatglm2", "--from", str(checkpoint), "--name", "tiny:v2").returncode == 0
    assert store(home, "import", "codegeex2", "--from", str(checkpoint), "--name", "tiny:v1").returncode == 0
    assert run_in_process(home, "found = store.resolve('tiny')\nanswer = [found.tag, found.family]") == [
        "tiny:v1",
        "codegeex2",
    ]
    again = store(home, "import", "chatglm2", "--from", str(checkpoint), "--name", "tiny:v1")
    assert again.returncode == 1
    assert one_line(again) == (
        "Error: the model store has tiny:v1 already: choose another version, or run `bentoml models delete tiny:v1`"
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


REFUSED: list[tuple[list[str], str]] = [
    (["import", "chatglm9", "--from", "{}"], "choose one of chatglm"),
    (["import", "chatglm2", "--from", "{}/nowhere"], "is not a folder"),
    (["import", "chatglm2", "--from", "{}", "--rope", "magic"], "--rope must be linear or base"),
    (["import", "chatglm2", "--from", "{}", "--name", "no good"], "cannot name a model"),
    (["import", "chatglm2", "--from", "{}", "--name", "x:latest"], "cannot name a model"),
    (["import", "chatglm2", "--from", "{}"], "rope_ratio=8"),
]


def test_a_refusal_is_one_line_and_leaves_nothing(home: Path, checkpoint: Path) -> None:
    config = checkpoint / "config.json"
    config.write_text(json.dumps(SMALL | {"rope_ratio": 8}))
    for arguments, words in REFUSED:
        done = store(home, *(argument.format(checkpoint) for argument in arguments))
        assert done.returncode == 1, done.stderr
        assert words in one_line(done)
        assert not everything_in(home)
    chosen = store(home, "import", "chatglm2", "--from", str(checkpoint), "--name", "long", "--rope", "linear")
    assert chosen.returncode == 0, chosen.stderr
    folder = next(path for path in (home / "models" / "long").iterdir() if path.is_dir())
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("linear", 8)


def imported_rope(family: str, checkpoint: Path) -> Mapping[str, Any]:
    """The rotary parameters that an import without options writes."""
    with staging_folder(checkpoint.parent) as target:
        FAMILIES[family].import_checkpoint(checkpoint, target, {}, no_progress)
        parameters: Mapping[str, Any] = json.loads((target / "config.json").read_text())["rope_parameters"]
    return parameters


def test_the_meaning_of_rope_ratio_is_read_from_the_checkpoints_code_else_from_the_family(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps(SMALL | {"rope_ratio": 50}))
    with pytest.raises(ImportRefused, match="--rope"):
        imported_rope("chatglm2", checkpoint)
    assert imported_rope("chatglm3", checkpoint)["rope_theta"] == 500_000
    code = checkpoint / "modeling_chatglm.py"
    code.write_text("raise SystemExit  # never run\nbase = base * self.rope_ratio\n")
    assert imported_rope("chatglm2", checkpoint)["rope_theta"] == 500_000
    code.write_text("positions = torch.arange(length) / self.rope_ratio\n")
    assert imported_rope("chatglm3", checkpoint)["factor"] == 50


def test_a_checkpoint_of_another_chatglm_family_is_refused_with_the_right_name(checkpoint: Path) -> None:
    (checkpoint / "tokenization_chatglm.py").write_text('role_special_tokens = ["<|system|>", "<|user|>"]')
    with pytest.raises(ImportRefused, match="family chatglm3"):
        imported_rope("chatglm2", checkpoint)
    (checkpoint / "tokenization_chatglm.py").write_text('prompt += "[Round {}]\\n\\n".format(i)')
    with pytest.raises(ImportRefused, match="family chatglm2"):
        imported_rope("chatglm3", checkpoint)


def test_the_error_for_a_missing_model_lists_the_models_and_the_import_command(home: Path, checkpoint: Path) -> None:
    code = (
        "try:\n    store.resolve('chatglm2-6b')\n    answer = None\n"
        "except store.StoreError as error:\n    answer = str(error)"
    )
    assert "it has: no models yet" in run_in_process(home, code)
    assert "There are no models yet" in store(home, "list").stdout
    store(home, "import", "chatglm2", "--from", str(checkpoint), "--name", "tiny:v1")
    foreign = "import bentoml\nwith bentoml.models.create('foreign:v1'): pass\n"
    message = run_in_process(home, foreign + code)
    assert "it has: tiny:v1)" in message
    assert "--name chatglm2-6b" in message
    assert "\n" not in message
    assert "has no family in its metadata" in run_in_process(home, code.replace("chatglm2-6b", "foreign"))


def large_checkpoint(folder: Path) -> Path:
    """Large enough to interrupt its import."""
    config = SMALL | {"hidden_size": 1024, "ffn_hidden_size": 4096, "num_layers": 5}
    weights = {name: tensor.half() for name, tensor in random_weights(config, 1).items()}
    write_checkpoint(folder, config, weights, shards=3)
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_import_leaves_nothing(number: signal.Signals, code: int, home: Path, tmp_path: Path) -> None:
    source = large_checkpoint(tmp_path / "large")
    command = [
        sys.executable,
        "-m",
        "models.store",
        "import",
        "chatglm2",
        "--from",
        str(source),
        "--name",
        "big:v1",
    ]
    with subprocess.Popen(command, env=environment(home), stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while process.poll() is None and not list(home.glob("importing-*/converted/config.json")):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert not (home / "models" / "big").exists()
    if number != signal.SIGKILL:
        assert not everything_in(home)
        return
    assert list(home.glob("importing-*"))  # the next import removes it
    done = store(home, "import", "chatglm2", "--from", str(source), "--name", "big:v1")
    assert done.returncode == 0, done.stderr
    assert not list(home.glob("importing-*"))


def test_a_working_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    with staging_folder(tmp_path) as first:
        (first / "work").write_text("x")
        with staging_folder(tmp_path) as second:
            assert first != second
        assert (first / "work").is_file()
        assert not second.exists()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_moved_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    move_folder(tmp_path / "a", tmp_path / "target")
    with pytest.raises(FileExistsError):
        move_folder(tmp_path / "b", tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "a"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this machine has no second file system to move to")
def test_a_folder_moves_to_another_file_system(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("a")
    with staging_folder(Path("/dev/shm")) as elsewhere:
        move_folder(tmp_path / "a", elsewhere / "target")
        assert (elsewhere / "target" / "file").read_text() == "a"
        link_or_copy(tmp_path / "a" / "file", elsewhere / "copied")
        assert (elsewhere / "copied").read_text() == "a"


def test_two_processes_may_ensure_the_demo_at_once(home: Path, tmp_path: Path) -> None:
    from models import demo

    if not (demo.CHECKPOINT / "config.json").is_file():
        pytest.skip("the demonstration checkpoint has not been built here")
    script = "from models.store import model_store as store; print(store.ensure_demo())"
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment(home), stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    tags = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert len(tags) == 1
    tag = tags.pop()
    assert re.fullmatch(r"chatglm2-demo:[0-9a-f]{12}", tag)
    assert run_in_process(home, "answer = [store.ensure_demo(), store.resolve('chatglm2-demo').tag]") == [tag, tag]
    assert not list(home.glob("importing-*"))


def test_too_little_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match="GB are free"):
        require_space(tmp_path, 10**18)
    require_space(tmp_path, 1)


def test_a_file_that_needs_no_conversion_is_linked_not_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_file({"a": torch.ones(10)}, source)
    (tmp_path / "symlink").symlink_to(source)
    link_or_copy(tmp_path / "symlink", tmp_path / "target")
    assert (tmp_path / "target").stat().st_ino == source.stat().st_ino


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    now = iter([0.0, 1.0, 1.01, 2.0, 10.0, 11.0, 12.0, 13.0])
    terminal, file = Terminal(), io.StringIO()
    printer = ProgressPrinter(terminal, lambda: next(now))
    for done in (250, 260, 1000):
        printer(done * 10**6, 10**9, "shard")
    printer.close()
    drawn = terminal.getvalue().split("\r")
    assert drawn[1] == "[######..................]  25%  250.0 MB of 1.0 GB  250.0 MB/s  0:03 left  shard"
    assert len(drawn) == 3
    assert drawn[2].startswith(f"[{'#' * 24}] 100%")
    assert drawn[2].endswith("\n")
    printer = ProgressPrinter(file, lambda: next(now))
    for done in (1, 500, 1000):
        printer(done * 10**6, 10**9, "shard")
    printer.close()
    assert [line[:4] for line in file.getvalue().splitlines()] == ["  0%", "100%"]
    assert describe(0, 0, 0.0, "x", with_bar=False).startswith("100%")
    assert [readable_bytes(n) for n in (7, 12_345, 12_487_168_064)] == ["7 bytes", "12.3 kB", "12.5 GB"]
