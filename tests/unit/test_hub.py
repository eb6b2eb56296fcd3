"""`import FAMILY OWNER/NAME` takes a model from a hub: only the files it needs, and in one line if it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.demo import CHECKPOINT
from models.store import hub
from models.store.model_store import resolve
from tests.golden_data import REPOSITORY
from tests.hub_server import COMMIT, Hub, running_hub


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Hub]:
    """THUDM/chatglm2-demo, with files beside it that nobody needs."""
    repository = tmp_path / "hub" / "THUDM" / "chatglm2-demo"
    shutil.copytree(CHECKPOINT, repository)
    (repository / "onnx").mkdir()
    (repository / "onnx" / "model.onnx").write_bytes(b"0" * 1000)
    (repository / "training_args.bin").write_bytes(b"0" * 1000)
    (repository / "README.md").write_text("about")
    with running_hub(Hub(tmp_path / "hub")) as running:
        yield running


def store(served_at: str, home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m models.store` with a cache and a store of its own."""
    environment = {
        **os.environ,
        "BENTOML_HOME": str(home / "bentoml"),
        "HF_HOME": str(home / "cache"),
        "HF_ENDPOINT": served_at,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **variables,
    }
    command = [sys.executable, "-m", "models.store", *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_a_name_is_downloaded_imported_and_kept_in_the_cache(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = store(served.url, tmp_path, "import", "chatglm2", "THUDM/chatglm2-demo")
    assert done.returncode == 0, done.stderr
    assert "chatglm2-demo:" in done.stdout
    fetched = {name for name, _ in served.fetched}
    assert {"config.json", "tokenizer.model"} <= fetched
    assert not fetched & {"model.onnx", "training_args.bin", "README.md"}
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    stored = resolve("chatglm2-demo")
    assert stored.metadata["source"] == "THUDM/chatglm2-demo"

    served.fetched.clear()
    again = store(served.url, tmp_path, "import", "chatglm2", f"THUDM/chatglm2-demo@{COMMIT}", "--name", "again")
    assert again.returncode == 0, again.stderr
    assert served.fetched == []


def test_a_download_that_breaks_off_is_completed(served: Hub, tmp_path: Path) -> None:
    weights = served.root / "THUDM" / "chatglm2-demo" / "model.safetensors"
    served.breaks[weights.name] = weights.stat().st_size // 2
    done = store(served.url, tmp_path, "import", "chatglm2", "THUDM/chatglm2-demo")
    if done.returncode:  # the client may try again by itself, or leave that to the next run
        assert "run the command again to go on" in done.stderr
        done = store(served.url, tmp_path, "import", "chatglm2", "THUDM/chatglm2-demo")
    assert done.returncode == 0, done.stderr
    assert [name for name, _ in served.fetched].count(weights.name) == 2


def test_a_name_without_a_family_is_inspected_by_its_small_files(served: Hub, tmp_path: Path) -> None:
    done = store(served.url, tmp_path, "inspect", "THUDM/chatglm2-demo")
    assert done.returncode == 0, done.stderr
    assert "import chatglm2 THUDM/chatglm2-demo" in done.stdout
    assert not any(name.endswith((".bin", ".safetensors")) for name, _ in served.fetched)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("THUDM/other", "no THUDM/other, or it is private: then set HF_TOKEN"),
        ("THUDM/chatglm2-demo@v9", "has no revision v9"),
        ("THUDM/chatglm2-demo/q4.gguf", "has no file q4.gguf"),
        ("modelscope:THUDM/chatglm2-demo", "pip install modelscope"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(served: Hub, tmp_path: Path, name: str, words: str) -> None:
    done = store(served.url, tmp_path, "import", "chatglm2", name)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_repository_that_asks_for_consent_and_a_hub_that_is_not_there(served: Hub, tmp_path: Path) -> None:
    served.token = "hf_right"
    done = store(served.url, tmp_path, "import", "chatglm2", "THUDM/chatglm2-demo", HF_TOKEN="hf_wrong")
    assert done.returncode == 1
    assert "asks for consent" in done.stderr
    done = store(served.url, tmp_path, "import", "chatglm2", "THUDM/chatglm2-demo", HF_TOKEN="hf_right")
    assert done.returncode == 0, done.stderr
    done = store("http://127.0.0.1:9", tmp_path, "import", "chatglm2", "THUDM/chatglm2-demo", "--name", "x")
    assert done.returncode == 1
    assert "set HF_ENDPOINT to a mirror" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_only_one_format_of_the_weights_is_chosen() -> None:
    repository = hub.Repository("hf", "a/b")
    weights = ["model.safetensors", "pytorch_model.bin", "consolidated.safetensors"]
    both = dict.fromkeys(["config.json", *weights, "1_Pooling/config.json"], 1)
    assert hub.choose(repository, both) == ["1_Pooling/config.json", "config.json", "model.safetensors"]
    with pytest.raises(hub.ImportRefused, match=r"name one of its GGUF files: q4\.gguf"):
        hub.choose(repository, {"config.json": 1, "q4.gguf": 5})
    assert hub.choose(hub.Repository("hf", "a/b", "q4.gguf"), {"config.json": 1, "q4.gguf": 5}) == ["q4.gguf"]
