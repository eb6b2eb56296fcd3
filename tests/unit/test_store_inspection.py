"""`models.store inspect` and imports that need an answer first: through the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.store.command_line import main
from tests.golden_data import GOLDEN, REPOSITORY

FINETUNE = GOLDEN / "finetune"


def folder(path: Path, config: dict[str, object], *tensors: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if tensors:
        save_file(dict.fromkeys(tensors, torch.zeros(1)) if len(tensors) == 1 else {n: torch.zeros(1) for n in tensors},
                  path / "model.safetensors")  # fmt: skip
    return path


CHATGLM = {"model_type": "chatglm", "padded_vocab_size": 65024}


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        (CHATGLM | {"pre_seq_len": 128}, ("transformer.prefix_encoder.embedding.weight",), "P-Tuning v2 prefix of 128"),
        (
            CHATGLM | {"pre_seq_len": 8},
            ("transformer.prefix_encoder.a", "transformer.b"),
            "with a P-Tuning v2 prefix\n",
        ),
        (CHATGLM | {"quantization_config": {"quant_method": "gptq"}}, (), "quantised by gptq: import the 16-bit"),
        (CHATGLM | {"padded_vocab_size": 151552}, (), "import glm4 --from"),
        ({"model_type": "chatglm", "vocab_size": 130528}, ("transformer.a",), "import chatglm --from"),
        (CHATGLM, ("module.transformer.a",), "1 tensors carry the prefix `module.`"),
        ({"model_type": "llama"}, (), "import hf --from"),
        (
            {"model_type": "qwen2", "quantization_config": {"quant_method": "bitsandbytes"}},
            (),
            "layout of that package",
        ),
        ({"model_type": "t5", "is_encoder_decoder": True}, (), "only decoders"),
    ],
)
def test_a_folder_is_named(
    config: dict[str, object], tensors: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(folder(tmp_path / "model", config, *tensors))]) == 0
    assert words in capsys.readouterr().out


def test_adapters_pointers_and_empty_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clone = folder(tmp_path / "clone", CHATGLM)
    (clone / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "outer").mkdir()
    folder(tmp_path / "outer" / "inner", CHATGLM)
    for path, words in (
        (FINETUNE / "glm2-lora-qkv", "a LoRA adapter for THUDM/chatglm2-6b (rank 8)"),
        (clone, "git lfs pull"),
        (tmp_path / "outer", "there are folders with one in it: inner"),
        (tmp_path / "none", "not a folder"),
    ):
        assert main(["inspect", str(path)]) == 0
        assert words in capsys.readouterr().out


def test_an_import_without_a_family_proposes_one_and_stores_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path))
    assert main(["import", str(FINETUNE / "glm2-base")]) == 1
    assert "import chatglm2 --from" in capsys.readouterr().err
    assert main(["import", "chatglm2"]) == 1
    assert "which model?" in capsys.readouterr().err
    assert main(["import", "chatglm2", "--from", str(FINETUNE / "glm2-lora-qkv")]) == 1
    assert "--adapter" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_dots_keeps_its_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "home"))
    shutil.copytree(FINETUNE / "glm2-base", tmp_path / "chatglm2.5-6b-tuned")
    command = [
        sys.executable,
        "-m",
        "models.store",
        "import",
        "chatglm2",
        "--from",
        str(tmp_path / "chatglm2.5-6b-tuned"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "chatglm2.5-6b-tuned:" in done.stdout, done.stderr
