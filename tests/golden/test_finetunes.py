"""Merged LoRA adapters and re-saved checkpoints answer as peft and the original code did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models.checkpoints import lora
from models.checkpoints.chatglm2 import convert
from models.checkpoints.inspection import inspect
from models.checkpoints.lora import AdapterFolder
from models.checkpoints.prepared import prepared
from models.family import ImportRefused
from models.store.progress import no_progress
from tests.golden_data import GOLDEN

FINETUNE = GOLDEN / "finetune"
TOLERANCE = 5e-5  # a wrong reading is off by 1 to 9
# that of GLM-4 is in test_glm4.py
ADAPTERS = sorted(path.name for path in FINETUNE.glob("[!g]*") if lora.is_adapter(path))
ADAPTERS += sorted(path.name for path in FINETUNE.glob("glm2-*") if lora.is_adapter(path))


@pytest.fixture(autouse=True)
def _one_thread() -> None:  # pyright: ignore[reportUnusedFunction]
    torch.set_num_threads(1)


def base_of(name: str) -> Path:
    return FINETUNE / f"{name.partition('-')[0]}-base"


def opened(folder: Path, work: Path) -> Any:
    """A checkpoint folder as the import reads it, in float32."""
    if json.loads((folder / "config.json").read_text())["model_type"] == "chatglm":
        converted = work / "converted"
        converted.mkdir()
        convert(folder, converted, "linear", no_progress)
        folder = converted
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check(model: Any, expected: Any) -> None:
    """The logits of every prompt, and the greedy tokens after it."""
    numbers = [key.removeprefix("ids") for key in expected if key.startswith("ids")]
    assert numbers
    for number in numbers:
        ids = torch.tensor(expected[f"ids{number}"])
        with torch.no_grad():
            logits = model(ids).logits[0]
        if f"logits{number}" in expected:
            wanted = expected[f"logits{number}"].reshape(logits.shape)
        else:
            wanted, logits = expected[f"logits{number}_last8"], logits[-8:]
        np.testing.assert_allclose(logits, wanted.reshape(logits.shape), rtol=0, atol=TOLERANCE)
        out = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0)
        assert (out[0, ids.shape[1] :].numpy() == expected[f"greedy24_{number}"].flatten()).all()


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_adapter_repeats_peft(name: str, tmp_path: Path) -> None:
    folder = prepared(base_of(name), [AdapterFolder(FINETUNE / name)], None, tmp_path / "prepared", no_progress)
    check(opened(folder, tmp_path), np.load(FINETUNE / name / "expected.npz"))


def test_the_weight_of_an_adapter_scales_it_and_several_add_up(tmp_path: Path) -> None:
    base, (a, b) = FINETUNE / "glm2-base", (FINETUNE / "glm2-lora-qkv", FINETUNE / "glm2-lora-all")
    name = "transformer.encoder.layers.0.self_attention.query_key_value.weight"

    def weight(*adapters: AdapterFolder) -> torch.Tensor:
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        return load_file(prepared(base, adapters, None, target, no_progress) / "model.safetensors")[name].float()

    plain = load_file(base / "model.safetensors")[name].float()
    of_a, of_b = weight(AdapterFolder(a)) - plain, weight(AdapterFolder(b)) - plain
    assert of_a.abs().max() > 1e-3
    both = weight(AdapterFolder(a, 0.5), AdapterFolder(b)) - plain
    torch.testing.assert_close(both, 0.5 * of_a + of_b, rtol=1e-3, atol=1e-3 * float(of_a.abs().max()))


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_a_re_saved_checkpoint_is_read_whatever_wrapped_it(wrapper: str, tmp_path: Path) -> None:
    source = FINETUNE / "glm2-resaved-bf16"
    if wrapper:
        source = tmp_path / "wrapped"
        shutil.copytree(FINETUNE / "glm2-resaved-bf16", source)
        for shard in source.glob("*.safetensors"):
            save_file({wrapper + name: tensor for name, tensor in load_file(shard).items()}, shard)
        index = source / "model.safetensors.index.json"
        if index.is_file():
            listed = json.loads(index.read_text())
            listed["weight_map"] = {wrapper + name: shard for name, shard in listed["weight_map"].items()}
            index.write_text(json.dumps(listed))
        found = inspect(source)
        assert found.family == "chatglm2"
        assert f"`{wrapper.partition('.')[0]}." in found.what
    folder = prepared(source, [], None, tmp_path / "prepared", no_progress)
    assert (folder == source) == (not wrapper)
    check(opened(folder, tmp_path), np.load(FINETUNE / "glm2-resaved-bf16" / "expected.npz"))


def changed(tmp_path: Path, **changes: object) -> AdapterFolder:
    folder = tmp_path / "adapter"
    shutil.copytree(FINETUNE / "glm2-lora-qkv", folder)
    config = json.loads((folder / lora.CONFIG_FILE).read_text())
    (folder / lora.CONFIG_FILE).write_text(json.dumps(config | changes))
    return AdapterFolder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "alters the base"),
        ({"lora_alpha": "16"}, "no usable lora_alpha"),
        ({"use_dora": True}, "use_dora .* contradict"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match=message):
        lora.read(changed(tmp_path, **changes))


def test_damaged_and_foreign_adapters_are_refused_in_one_line(tmp_path: Path) -> None:
    adapter = changed(tmp_path)
    weights = adapter.path / "adapter_model.safetensors"
    tensors = load_file(weights)
    with pytest.raises(ImportRefused, match="which the base lacks: it belongs to another"):
        prepared(FINETUNE / "llama-base", [adapter], None, tmp_path / "a", no_progress)
    first = sorted(tensors)[0]
    save_file(tensors | {first: tensors[first][:, :-1].contiguous()}, weights)
    with pytest.raises(ImportRefused, match="has the shape"):
        prepared(FINETUNE / "glm2-base", [adapter], None, tmp_path / "b", no_progress)
    save_file(tensors | {first: tensors[first] * float("nan")}, weights)
    with pytest.raises(ImportRefused, match="not finite"):
        prepared(FINETUNE / "glm2-base", [adapter], None, tmp_path / "c", no_progress)
    weights.unlink()
    torch.save({"a": shutil.copytree}, adapter.path / "adapter_model.bin")
    with pytest.raises(ImportRefused, match="holds more than plain tensors"):
        prepared(FINETUNE / "glm2-base", [adapter], None, tmp_path / "d", no_progress)
    with pytest.raises(ImportRefused, match=r"no adapter_config\.json"):
        lora.parse(str(FINETUNE / "glm2-base"))


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    adapter = AdapterFolder(FINETUNE / "glm2-lora-qkv")
    with pytest.raises(ImportRefused, match="quantised: merge the adapter glm2-lora-qkv into the 16-bit base"):
        prepared(GOLDEN / "model" / "glm2-int4", [adapter], None, tmp_path / "a", no_progress)
