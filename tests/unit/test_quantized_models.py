"""A model stored in 8 or 4 bits gives the logits of one that is quantised while it loads; its metadata says so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kernels.layouts import GROUP
from kernels.precision import QuantizedPrecision
from kernels.quantization import QuantizedLinear
from models.checkpoints.quantized import quantize_folder, stored_precision
from models.families import hf
from models.family import ImportRefused
from models.store.model_store import StoreError, import_model, quantize_model, servable
from models.store.progress import no_progress
from serving.settings import Settings
from serving.worker.start_native import start_model
from tests.hf_folders import SIZES, write_folder
from tests.original_glm import SMALL, random_weights, write_checkpoint
from tests.own_store import own_store
from tests.reference_attention import ReferenceAttention, forward
from tests.sources import source_of

CPU = torch.device("cpu")
FAMILY = hf.FAMILY


def logits(folder: Path, metadata: dict[str, object], precision: QuantizedPrecision) -> torch.Tensor:
    network = FAMILY.load(folder, metadata, CPU, precision, no_progress).network
    ids = list(range(5, 25))
    return forward(network, ReferenceAttention(), {0: (ids, 0, network.layout(ids))})[0]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "glm", "glm4"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_stored_or_made_while_loading_the_logits_are_the_same(
    tmp_path: Path, kind: str, precision: QuantizedPrecision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary by halves and by neighbours, separate and concatenated products, an output layer tied to the embedding."""
    monkeypatch.setitem(SIZES, "hidden_size", 2 * GROUP)
    monkeypatch.setitem(SIZES, "intermediate_size", 3 * GROUP + 8)  # groups that are not full
    source, imported, quantized = (tmp_path / name for name in ("source", "imported", "quantized"))
    write_folder(source, kind)
    weights = {name: tensor.half() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    imported.mkdir()
    quantized.mkdir()
    metadata = FAMILY.import_checkpoint(source, imported, {}, no_progress)
    quantize_folder(imported, quantized, precision, no_progress)
    assert stored_precision(quantized) == precision
    assert torch.equal(logits(quantized, metadata, precision), logits(imported, metadata, precision))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_stored_layer_is_as_exact_as_its_format_allows(precision: QuantizedPrecision) -> None:
    torch.manual_seed(2)
    linear = nn.Linear(4 * GROUP, 300)
    dequantized = QuantizedLinear.from_linear(linear, precision).dequantized()
    steps = linear.weight.abs().amax() / (127 if precision == "int8" else 7.5)
    within = 0.55 if precision == "int8" else 1.1  # four bits may clamp, where that is the least squared error
    assert (dequantized.weight - linear.weight).abs().max() <= within * steps
    assert torch.equal(dequantized.bias, linear.bias)


@pytest.mark.parametrize("num_inputs", [GROUP + 8, 7, 3 * GROUP + 1])
def test_inputs_that_do_not_divide_into_groups_stay_in_four_bits(num_inputs: int) -> None:
    linear = nn.Linear(num_inputs, 16)
    stored = QuantizedLinear.from_linear(linear, "int4")
    assert stored.precision == "int4"
    assert (stored.dequantized().weight - linear.weight).abs().max() <= 0.15 * linear.weight.abs().max()


def test_the_store_keeps_a_quantised_copy_and_serves_it_as_it_is(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", SMALL, random_weights(SMALL, 1), shards=2)
    with own_store(tmp_path / "home"):
        import_model("chatglm2", tmp_path / "checkpoint", "tiny:1", {}, no_progress)
        tag = quantize_model("tiny:1", "int8", None, no_progress)
        assert tag.startswith("tiny-int8:")
        stored = servable(tag)
        assert stored.family == "chatglm2"
        kept = {key: stored.metadata[key] for key in ("quantized", "dtype", "source_precision", "source")}
        assert kept == {"quantized": "int8", "dtype": "int8", "source_precision": "float32", "source": "tiny:1"}
        with pytest.raises(ImportRefused, match="in int8 already"):
            quantize_model(tag, "int4", None, no_progress)
        with pytest.raises(StoreError, match="already"):
            quantize_model("tiny:1", "int8", tag, no_progress)
        settings = Settings(device="cpu", threads=1, kv_cache_gib=0.01)
        source = source_of(stored, settings)
        started = start_model(source, settings, logging.getLogger("tests"))
        started.running.engine.stop(10)
        assert started.precision == "int8"
        with pytest.raises(ImportRefused, match="stored in int8"):
            start_model(source, settings.model_copy(update={"precision": "bfloat16"}), logging.getLogger("tests"))
