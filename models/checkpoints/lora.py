"""LoRA adapters of the peft package -> the tensors of their base model with the adapters merged in.

    weight + s * B @ A           s = alpha / r, or alpha / sqrt(r) with use_rslora
    embedding + s * (B @ A)^T
    DoRA: the rows of the former, each scaled to the length that `lora_magnitude_vector` says

A has the shape [r, in], B [out, r]. Values of `modules_to_save` and biases replace those of the base. Names are
those of the original checkpoint, so that merging comes before fused weights are divided. Source: peft 0.12 to 0.21.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.files import read_json, refuse_lfs_pointer
from models.checkpoints.shards import TensorInfo, read_shard
from models.family import ImportRefused

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
# what changes numbers in a way that is not computed here, with the values that mean nothing
UNSUPPORTED = (
    "layer_replication",
    "fan_in_fan_out",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
)
ALTERED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin that change the base's weights


@dataclass(frozen=True)
class AdapterFolder:
    """`--adapter DIR[=WEIGHT]`."""

    path: Path
    weight: float = 1.0


@dataclass
class LowRank:
    """The matrices of one module."""

    scale: float
    a: Tensor | None = None
    b: Tensor | None = None
    magnitude: Tensor | None = None
    is_embedding: bool = False


@dataclass
class Adapter:
    """An adapter in memory. Names are those of the base's tensors."""

    source: AdapterFolder
    low_rank: dict[str, LowRank] = field(default_factory=dict[str, LowRank])
    replacements: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def check(self, found: Mapping[str, TensorInfo]) -> None:
        """Raise ImportRefused unless everything that is changed exists in the base with a shape that fits."""
        name = self.source.path.name
        for target in (*self.low_rank, *self.replacements):
            if target not in found:
                raise ImportRefused(f"the adapter {name} changes {target}, which the base lacks: it belongs to another")
            if not found[target].dtype.is_floating_point:
                raise ImportRefused(f"{target} of the base is quantised: merge the adapter {name} into the 16-bit base")
        shapes = {target: self._shape(target, pair) for target, pair in self.low_rank.items()}
        for target, shape in (shapes | {target: tuple(t.shape) for target, t in self.replacements.items()}).items():
            if shape != found[target].shape:
                raise ImportRefused(
                    f"the adapter {name} has the shape {list(shape)} for {target}, the base {list(found[target].shape)}"
                )

    def _shape(self, target: str, pair: LowRank) -> tuple[int, ...]:
        if pair.a is None or pair.b is None or pair.a.ndim != 2 or pair.b.shape[1:] != pair.a.shape[:1]:
            raise ImportRefused(f"the adapter {self.source.path.name} lacks a matrix of {target}, or they do not fit")
        shape = (pair.b.shape[0], pair.a.shape[1])
        return shape[::-1] if pair.is_embedding else shape

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor `name` of the base with this adapter, in its own type; computed in float32."""
        weight = self.source.weight
        if name in self.replacements:
            new = self.replacements[name]
            mixed = new.float() if weight == 1 else torch.lerp(tensor.float(), new.float(), weight)
            return mixed.to(tensor.dtype)
        pair = self.low_rank.get(name)
        if pair is None:
            return tensor
        assert pair.a is not None
        assert pair.b is not None
        delta = pair.scale * weight * (pair.b.float() @ pair.a.float())
        result = tensor.float() + (delta.T if pair.is_embedding else delta)
        if pair.magnitude is not None:
            length = torch.linalg.vector_norm(result, dim=1)
            result *= (pair.magnitude.float() / length)[:, None]
        return result.to(tensor.dtype)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def parse(argument: str) -> AdapterFolder:
    """DIR or DIR=WEIGHT. Raises ImportRefused."""
    path, equals, weight = argument.rpartition("=")
    try:
        folder = AdapterFolder(Path(path), float(weight)) if equals else AdapterFolder(Path(argument))
    except ValueError:
        folder = AdapterFolder(Path(argument))
    if not math.isfinite(folder.weight):
        raise ImportRefused(f"--adapter {argument}: the weight must be a finite number")
    if not is_adapter(folder.path):
        raise ImportRefused(f"--adapter {folder.path}: there is no {CONFIG_FILE} in it")
    return folder


def read(source: AdapterFolder) -> Adapter:
    """Raises ImportRefused for what is not a LoRA, for what is not computed here, and for numbers not finite."""
    config = read_json(source.path / CONFIG_FILE)
    _check_config(config, source.path)
    file = next((source.path / name for name in WEIGHT_FILES if (source.path / name).is_file()), None)
    if file is None:
        raise ImportRefused(f"{source.path} has no {' or '.join(WEIGHT_FILES)}: copy the whole adapter folder")
    refuse_lfs_pointer(file)
    adapter = Adapter(source)
    for key, tensor in read_shard(file):
        if not tensor.isfinite().all():
            raise ImportRefused(f"the adapter {source.path.name} holds numbers that are not finite ({key})")
        _add(adapter, config, key, tensor.clone())
    if not adapter.low_rank and not adapter.replacements:
        raise ImportRefused(f"{file} holds no tensors of an adapter")
    for target, pair in adapter.low_rank.items():
        if (pair.magnitude is not None) != bool(config.get("use_dora")):
            raise ImportRefused(f"use_dora of {CONFIG_FILE} and the tensors of {target} contradict each other")
        if pair.magnitude is not None and source.weight != 1:
            raise ImportRefused(f"{source.path.name} is a DoRA adapter, which has no weight other than 1")
    return adapter


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ImportRefused(f"{folder / CONFIG_FILE} says peft_type {kind!r}; only LORA can be merged")
    for key in UNSUPPORTED:
        if config.get(key):
            raise ImportRefused(f"{folder / CONFIG_FILE} sets {key}, which is not supported: merge it with peft first")
    begun = str(config.get("init_lora_weights", "")).lower()
    if begun.startswith(ALTERED_BASES):
        raise ImportRefused(f"the adapter was begun by {begun}, which alters the base: merge it with peft first")


def _add(adapter: Adapter, config: Mapping[str, Any], key: str, tensor: Tensor) -> None:
    name = key.removeprefix(PREFIX)
    for part, attribute in (
        (".lora_A.weight", "a"),
        (".lora_B.weight", "b"),
        (".lora_embedding_A", "a"),
        (".lora_embedding_B", "b"),
        (".lora_magnitude_vector.weight", "magnitude"),
        (".lora_magnitude_vector", "magnitude"),
    ):
        module = name.removesuffix(part)
        if module != name:
            pair = adapter.low_rank.setdefault(f"{module}.weight", LowRank(0.0))
            pair.is_embedding = pair.is_embedding or "embedding" in part
            setattr(pair, attribute, tensor)
            if attribute == "a":
                pair.scale = _scale(config, module, tensor.shape[0])
            return
    if ".lora_" in name:
        raise ImportRefused(f"the adapter {adapter.source.path.name} has tensors of an unknown kind ({key})")
    adapter.replacements[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = tensor


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = next(
        (
            value
            for pattern, value in (config.get("alpha_pattern") or {}).items()
            if module == pattern or module.endswith(f".{pattern}")
        ),
        config.get("lora_alpha"),
    )
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise ImportRefused(f"{CONFIG_FILE} has no usable lora_alpha ({alpha!r})")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_all(folders: Sequence[AdapterFolder]) -> list[Adapter]:
    return [read(folder) for folder in folders]
