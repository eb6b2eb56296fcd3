"""The command `chatglm` as `make setup` installs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.settings import PREFIX, Settings
from tests.golden_data import GOLDEN


def run(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return subprocess.run(
        [str(Path(sys.executable).parent / "chatglm"), *arguments],
        env={**kept, "BENTOML_HOME": str(home), **variables},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_settings_have_their_value_default_and_origin(tmp_path: Path) -> None:
    done = run(tmp_path, "settings", CHATGLM_MAX_N="7", CHATGLM_API_KEYS="secret")
    assert done.returncode == 0, done.stderr
    assert "CHATGLM_MAX_N = 7  [environment; default 128]" in done.stdout
    assert "secret" not in done.stdout
    assert len(done.stdout.splitlines()) == len(Settings.model_fields)
    done = run(tmp_path, "settings", CHATGLM_MODLE="x")
    assert (done.returncode, done.stdout) == (1, "")
    assert "did you mean CHATGLM_MODEL?" in done.stderr


def test_check_says_what_a_start_has(tmp_path: Path) -> None:
    done = run(tmp_path, "check")
    assert done.returncode == 0, done.stderr
    assert "model: chatglm2-demo:" in done.stdout
    assert "listens on loopback only" in done.stdout
    assert run(tmp_path, "check", CHATGLM_MODEL="nothing").returncode == 1


def test_models_are_the_store(tmp_path: Path) -> None:
    done = run(tmp_path, "models", "inspect", str(GOLDEN / "finetune" / "glm2-lora-qkv"))
    assert "a LoRA adapter" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("sreve",)])
def test_wrong_usage_lists_the_commands(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert "serve [--port N]" in done.stderr
