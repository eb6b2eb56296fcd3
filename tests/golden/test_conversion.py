"""Converted checkpoints answer as the original code did: golden values, and further checkpoints of the same format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GlmForCausalLM

from models.checkpoints.chatglm2 import RopeRule, convert
from models.checkpoints.open_decoder import load_transformers
from models.checkpoints.shards import ShardWriter
from models.family import ImportRefused
from models.networks.transformers_decoder import TransformersDecoder
from models.store.progress import no_progress
from serving.engine.interface import RaggedBatch
from tests.golden_data import GOLDEN
from tests.original_glm import SMALL, random_weights, reference_logits, write_checkpoint

TOLERANCE = 1e-5  # a forgotten rms_norm_eps moves the logits by only 4e-5
CHECKPOINTS = [
    "glm2-1file-bin",
    "glm2-1file-safetensors",
    "glm2-2shard-bin",
    "glm2-2shard-safetensors",
    "glm2-32k-linear16",
    "glm2-fp16",
    "glm2-int4",
    "glm2-int8",
    "glm2-mha-nobias",
    "glm3-bf16",
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:  # pyright: ignore[reportUnusedFunction]
    torch.set_num_threads(1)


def causal(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
    """An attention over one whole sequence, in place of the engine's."""
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def decoder_logits(folder: Path, ids: Tensor) -> Tensor:
    model = load_transformers(folder, torch.device("cpu"), "float32", no_progress)
    decoder = TransformersDecoder(model, num_tokens=ids.max().item() + 1, max_positions=4096)
    return decoder.logits(decoder.forward(RaggedBatch(ids, torch.arange(len(ids)), ()), causal))


def greedy(model: GlmForCausalLM, ids: Tensor, num_tokens: int, **inputs: Tensor) -> np.ndarray[Any, Any]:
    out = model.generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, **inputs)
    return out[:, ids.shape[1] :].numpy()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_converted_checkpoint_repeats_the_original_code(name: str, tmp_path: Path) -> None:
    source = GOLDEN / "model" / name
    convert(source, tmp_path, "linear", no_progress)
    expected: Mapping[str, np.ndarray[Any, Any]] = np.load(source / "expected.npz")
    model, info = GlmForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]

    short = torch.tensor(expected["short_ids"])
    with torch.no_grad():
        np.testing.assert_allclose(model(short).logits, expected["short_logits"], rtol=0, atol=TOLERANCE)
    ours = decoder_logits(tmp_path, short[0])
    np.testing.assert_allclose(ours, expected["short_logits"][0], rtol=0, atol=TOLERANCE)
    assert (greedy(model, short, 64)[0] == expected["short_greedy64"]).all()
    if "long_ids" not in expected:
        return
    long = torch.tensor(expected["long_ids"])
    with torch.no_grad():
        np.testing.assert_allclose(
            model(long).logits[0, -8:], expected["long_last8_logits"].reshape(8, -1), rtol=0, atol=TOLERANCE
        )
    assert (greedy(model, long, 64)[0] == expected["long_greedy64"]).all()
    padded, mask = torch.tensor(expected["pad_ids"]), torch.tensor(expected["pad_mask"])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        last = model(padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    np.testing.assert_allclose(last, expected["pad_last_logits"], rtol=0, atol=TOLERANCE)
    assert (greedy(model, padded, 64, attention_mask=mask) == expected["pad_greedy64"]).all()


VARIANTS: list[tuple[dict[str, Any], RopeRule, int, str]] = [
    ({}, "linear", 1, "safetensors"),
    ({"multi_query_group_num": 1}, "linear", 3, "bin"),
    ({"multi_query_group_num": 4}, "linear", 2, "safetensors"),
    ({"multi_query_attention": False}, "linear", 1, "bin"),
    ({"multi_query_attention": False, "add_qkv_bias": False, "kv_channels": 16}, "linear", 5, "safetensors"),
    ({"layernorm_epsilon": 1e-3, "num_layers": 3, "num_attention_heads": 2, "kv_channels": 32}, "linear", 1, "bin"),
    ({"rope_ratio": 16}, "linear", 1, "safetensors"),
    ({"rope_ratio": 50}, "base", 1, "safetensors"),
    ({"rope_ratio": 2.5}, "linear", 1, "safetensors"),
]


@pytest.mark.parametrize(("changes", "rope", "shards", "suffix"), VARIANTS)
def test_every_shape_of_the_network_is_converted(
    changes: dict[str, Any], rope: RopeRule, shards: int, suffix: str, tmp_path: Path
) -> None:
    config = SMALL | changes
    weights = random_weights(config, seed=shards)
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    write_checkpoint(source, config, weights, shards=shards, suffix=suffix)
    convert(source, target, rope, no_progress)
    ids = torch.randint(3, 400, (60,), generator=torch.Generator().manual_seed(7))
    wanted = reference_logits(config, weights, ids, rope)
    np.testing.assert_allclose(decoder_logits(target, ids), wanted, rtol=0, atol=TOLERANCE)
    if "rope_ratio" in changes:
        other = reference_logits(config, weights, ids, "base" if rope == "linear" else "linear")
        assert (wanted - other).abs().max() > 0.1  # the two rules differ


def test_four_and_eight_bits_are_read_back_row_by_row(tmp_path: Path) -> None:
    for bits, limit in ((4, 7), (8, 127)):
        config = SMALL | {"quantization_bit": bits}
        weights = {name: tensor.half() for name, tensor in random_weights(config, seed=bits).items()}
        stored, plain = dict(weights), dict(weights)
        for name, weight in weights.items():
            if weight.ndim == 2 and ".layers." in name:
                scale = (weight.abs().amax(1) / limit).half()
                whole = (weight / scale[:, None]).round().clamp(-limit, limit).to(torch.int8)
                plain[name] = whole.half() * scale[:, None]
                numbers = whole.numpy().astype(np.int16)
                packed = numbers if bits == 8 else (numbers[:, ::2] & 15) << 4 | (numbers[:, 1::2] & 15)
                stored[name] = torch.from_numpy(packed.astype(np.uint8).view(np.int8).copy())
                stored[f"{name}_scale"] = scale
        source, target = tmp_path / f"int{bits}", tmp_path / f"int{bits}-converted"
        target.mkdir()
        write_checkpoint(source, config, stored, shards=3)  # a weight and its scale fall into different shards
        metadata = convert(source, target, None, no_progress)
        assert (metadata["dtype"], metadata["source_precision"]) == ("float16", f"int{bits}")
        ids = torch.arange(3, 40)
        wanted = reference_logits(config, plain, ids, "linear")
        np.testing.assert_allclose(decoder_logits(target, ids), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_keep_their_precision_and_are_readable_by_every_user(dtype: torch.dtype, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(SMALL, 1).items()}
    write_checkpoint(source, SMALL, weights)
    convert(source, target, None, no_progress)
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {dtype}
    assert AutoConfig.from_pretrained(target).dtype == dtype
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o644}


def test_large_weights_are_written_in_shards_that_transformers_finds(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_bytes=1000)
    tensors = {f"t{i}": torch.full((60,), float(i)) for i in range(9)} | {"large": torch.ones(600)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / shard)[name], tensors[name])


def test_every_configuration_that_the_network_cannot_compute_is_refused(tmp_path: Path) -> None:
    golden = GOLDEN / "model" / "glm2-1file-safetensors"
    for case in json.loads((GOLDEN / "model" / "refuse_configs.json").read_text()):
        source, target = tmp_path / "source", tmp_path / "target"
        shutil.copytree(golden, source, copy_function=shutil.copyfile, dirs_exist_ok=True)
        target.mkdir(exist_ok=True)
        source.chmod(0o755)
        config = json.loads((golden / "config.json").read_text()) | case["config_override"]
        (source / "config.json").write_text(json.dumps(config))
        assert_refused(source, target, "")
    with pytest.raises(ImportRefused, match="the family chatglm"):
        convert(GOLDEN / "model" / "glm1-tiny", tmp_path, None, no_progress)


def assert_refused(source: Path, target: Path, *words: str) -> None:
    with pytest.raises(ImportRefused) as refusal:
        convert(source, target, None, no_progress)
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not list(target.iterdir())


def damage(source: Path, kind: str) -> tuple[str, ...]:
    """Damage a two-shard checkpoint in one way; return what the refusal must name."""
    first, second = source / "model-00001-of-00002.safetensors", source / "model-00002-of-00002.safetensors"
    index = source / "model.safetensors.index.json"
    tensors = load_file(second)
    name = "transformer.output_layer.weight"
    name = name if name in tensors else next(iter(tensors))
    match kind:
        case "missing shard":
            second.unlink()
            return (second.name,)
        case "pointer":
            first.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
            return ("git lfs pull", first.name)
        case "truncated":
            first.write_bytes(first.read_bytes()[:-500])
            return (first.name, "download it again")
        case "no index":
            index.unlink()
            return ("index",)
        case "outside":
            index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
            return ("../elsewhere.safetensors",)
        case "missing tensor":
            del tensors[name]
        case "extra tensor":
            tensors["transformer.other.weight"] = torch.ones(2)
            name = "transformer.other.weight"
        case "duplicate tensor":
            name, tensor = next(iter(load_file(first).items()))
            tensors[name] = tensor
        case "wrong shape":
            tensors[name] = torch.ones(3, 3)
        case "int8 without quantization_bit":
            tensors[name] = tensors[name].to(torch.int8)
        case _:
            raise AssertionError(kind)
    save_file(tensors, second)
    return (name,)


@pytest.mark.parametrize(
    "kind",
    [
        "missing shard",
        "pointer",
        "truncated",
        "no index",
        "outside",
        "missing tensor",
        "extra tensor",
        "duplicate tensor",
        "wrong shape",
        "int8 without quantization_bit",
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    write_checkpoint(source, SMALL, random_weights(SMALL, 5), shards=2)
    assert_refused(source, target, *damage(source, kind))


class NotATensor:
    """An object that a pickle of weights must not contain."""


@pytest.mark.parametrize("content", [{"a": 1}, [torch.ones(1)], {"a": NotATensor()}, {"a": {"b": torch.ones(1)}}])
def test_a_pickle_that_is_not_plain_tensors_is_refused(content: object, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    write_checkpoint(source, SMALL, {}, suffix="bin")
    torch.save(content, source / "pytorch_model.bin")
    assert_refused(source, target, "pytorch_model.bin")
    (source / "pytorch_model.bin").write_bytes(b"not a pickle at all")
    assert_refused(source, target, "pytorch_model.bin")


@pytest.mark.parametrize("version", ["zip", "before torch 1.6"])
def test_both_pickle_formats_are_read(version: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    weights = random_weights(SMALL, 6)
    write_checkpoint(source, SMALL, weights, suffix="bin")
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=version == "zip")
    convert(source, target, None, no_progress)
    ids = torch.arange(3, 30)
    wanted = reference_logits(SMALL, weights, ids, "linear")
    np.testing.assert_allclose(decoder_logits(target, ids), wanted, rtol=0, atol=TOLERANCE)


def tiny_config(model_type: str, **changes: object) -> Any:
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return AutoConfig.for_model(model_type, **(small | changes))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "glm", "glm4", "mistral", "mixtral"])
def test_any_decoder_of_transformers_is_a_causal_lm(model_type: str) -> None:
    changes = {"num_local_experts": 2} if model_type == "mixtral" else {"head_dim": 8}
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).eval()
    ids = torch.arange(5, 25)
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
    decoder = TransformersDecoder(model, num_tokens=60, max_positions=99)
    ours = decoder.logits(decoder.forward(RaggedBatch(ids, torch.arange(20), ()), causal))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=TOLERANCE)
    shape = decoder.shape
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (2, 4, 2, 8)
    assert (shape.vocab_size, shape.num_tokens, shape.max_positions) == (64, 60, 99)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma2", {"head_dim": 8}),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 2}),
        ("cohere", {"logit_scale": 0.0625}),
        ("granite", {"logits_scaling": 8.0}),
        ("qwen3_next", {"head_dim": 8, "num_experts": 2}),
        ("falcon", {"alibi": True}),
        ("bloom", {"n_head": 4, "n_layer": 2}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("llama4_text", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32}),
    ],
)
def test_a_network_that_needs_another_attention_or_head_is_refused(model_type: str, changes: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).eval()
    with pytest.raises(ImportRefused) as refusal:
        TransformersDecoder(model, num_tokens=64, max_positions=64)
    assert "\n" not in str(refusal.value)
