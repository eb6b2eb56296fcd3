"""A value of config.json that changes the network is computed as transformers computes it, or refused by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models.families.hf import FAMILY
from models.family import ImportRefused
from models.store.progress import no_progress
from tests.hf_folders import write_folder
from tests.reference_attention import ReferenceAttention, forward

torch.set_num_threads(1)

LENGTH = 256  # max_position_embeddings of the tiny models
YARN: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
THETA = {"rope_theta": 10_000.0}
WINDOWED = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0, "layer_types": None}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    for kind in ("llama", "mistral", "qwen3", "glm", "glm4"):
        write_folder(root / kind, kind)
        file = root / kind / "config.json"
        config = json.loads(file.read_text())
        rope = config.pop("rope_parameters")  # the layout of published folders
        config |= {name: value for name, value in rope.items() if name != "rope_type"}
        file.write_text(json.dumps(config))
    return root


def changed(sources: Path, kind: str, target: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(sources / kind, target / "source")
    file = target / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (target / "stored").mkdir()
    return target / "source"


def imported(target: Path) -> dict[str, Any]:
    return FAMILY.import_checkpoint(target / "source", target / "stored", {}, no_progress)


def transformers_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0, -1]
    return logits


HONOURED: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {"rope_scaling": YARN}, 256),
    ("llama", {"rope_scaling": YARN, "max_position_embeddings": 64}, 256),
    ("llama", {"rope_scaling": {**YARN, "attention_factor": 1.5, "beta_fast": 16, "finetuned": True}}, 256),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 512),
    ("llama", {"rope_theta": None, "rope_parameters": {**YARN, "rope_theta": 1e6}}, 256),
    ("qwen3", {"rope_scaling": YARN, "max_position_embeddings": 80}, 256),
    ("mistral", {"rope_scaling": YARN}, 256),
    ("glm", {"rope_scaling": YARN}, 256),
    ("llama", {"rope_scaling": LLAMA3}, LENGTH),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, LENGTH),
    ("llama", {"rope_theta": 1e6}, LENGTH),
    ("glm", {"rope_theta": 1e8, "max_position_embeddings": 1 << 20}, 1 << 20),
    ("glm", {"partial_rotary_factor": 0.25}, LENGTH),
    ("glm4", {"rope_theta": 1e8}, LENGTH),
    ("mistral", {"sliding_window": None}, LENGTH),
    ("mistral", {"sliding_window": 20}, LENGTH),
    ("qwen3", WINDOWED, LENGTH),
    ("llama", {"hidden_act": "gelu"}, LENGTH),
    ("llama", {"rms_norm_eps": 0.1}, LENGTH),
]


@pytest.mark.parametrize(("kind", "changes", "length"), HONOURED)
def test_what_transformers_computes_is_computed(
    sources: Path, tmp_path: Path, kind: str, changes: dict[str, Any], length: int
) -> None:
    source = changed(sources, kind, tmp_path, changes)
    metadata = imported(tmp_path)
    assert metadata["context_length"] == length
    network = FAMILY.load(tmp_path / "stored", metadata, torch.device("cpu"), "float32", no_progress).network
    ids = torch.randint(5, 250, (120,), generator=torch.Generator().manual_seed(1)).tolist()
    got = forward(network, ReferenceAttention(), {0: (ids, 0, network.layout(ids))})[0]
    expected = transformers_logits(source, ids)
    assert (got - expected).abs().max() < 1e-5
    assert (transformers_logits(sources / kind, ids) - expected).abs().max() > 5e-5, "the value changes nothing"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("glm", {"rope_ratio": 10000, "seq_length": 1 << 20}, "rope_ratio=10000"),
    ("llama", {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e4}}, "both rope_scaling and rope_parameters"),
    ("llama", {"rope_scaling": {"factor": 4.0}}, "'factor'"),
    ("llama", {"rope_scaling": {**YARN, "factr": 2}}, "'factr'"),
    ("llama", {"rope_scaling": {**YARN, "factor": "4.0"}}, "'factor'"),
    ("llama", {"rope_scaling": {**YARN, "factor": 0.5}}, "'factor'"),
    ("llama", {"rope_scaling": {"type": "wonder", "factor": 4.0}}, "'wonder'"),
    ("llama", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "'mrope'"),
    ("llama", {"rope_parameters": {"full_attention": YARN}}, "'full_attention'"),
    ("llama", {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta=1000000"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"sliding_window": 8}, "sliding_window=8"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("qwen3", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
    ("glm4", {"logits_scaling": 8.0}, "logits_scaling"),
    ("llama", {"layer_norm_eps": 0.1}, "layer_norm_eps"),
    ("llama", {"is_causal": False}, "is_causal"),
    ("qwen3", {"dual_chunk_attention_config": {"chunk_size": 64}}, "dual_chunk_attention_config"),
    ("llama", {"attention_bias": True}, r"missing weights: .*bias"),
    ("llama", {"mlp_bias": True}, r"missing weights: .*bias"),
    ("qwen3", {"tie_word_embeddings": False}, "missing weights: lm_head"),
    ("llama", {"head_dim": 4}, "mismatched"),
]


@pytest.mark.parametrize(("kind", "changes", "reason"), REFUSED)
def test_what_transformers_does_not_compute_is_refused_by_name(
    sources: Path, tmp_path: Path, kind: str, changes: dict[str, Any], reason: str
) -> None:
    """Served without it, the model would write nonsense, or write well until a prompt is long."""
    changed(sources, kind, tmp_path, changes)
    with pytest.raises(ImportRefused, match=reason) as caught:
        imported(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rope", [{"type": "dynamic", "factor": 4.0}])
def test_positions_that_depend_on_the_batch_are_refused_by_the_native_engine(
    sources: Path, tmp_path: Path, rope: dict[str, Any]
) -> None:
    changed(sources, "llama", tmp_path, {"rope_scaling": rope})
    metadata = imported(tmp_path)  # vLLM serves it
    with pytest.raises(ImportRefused, match=rope["type"]):
        FAMILY.load(tmp_path / "stored", metadata, torch.device("cpu"), "float32", no_progress)


def test_harmless_values_of_other_architectures_are_imported(sources: Path, tmp_path: Path) -> None:
    changed(
        sources,
        "llama",
        tmp_path,
        {"rope_ratio": 1, "sliding_window": None, "use_sliding_window": False, "pretraining_tp": 1, "logit_scale": 1.0},
    )
    assert imported(tmp_path)["context_length"] == LENGTH


@pytest.mark.parametrize(
    ("name", "is_refused"),
    [
        ("model.layers.1.self_attn.q_proj.bias", True),
        ("model.layers.0.mlp.down_proj.bias", True),
        ("model.layers.0.self_attn.q_norm.weight", True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),  # computed from the configuration
        ("model.layers.2.eh_proj.weight", False),  # a multi-token prediction
    ],
)
def test_weights_that_the_network_would_leave_out_are_refused(
    sources: Path, tmp_path: Path, name: str, is_refused: bool
) -> None:
    source = changed(sources, "llama", tmp_path, {})
    file = source / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(32)}, file, metadata={"format": "pt"})
    if is_refused:
        with pytest.raises(ImportRefused, match=f"unexpected weights: {name}"):
            imported(tmp_path)
    else:
        assert imported(tmp_path)
