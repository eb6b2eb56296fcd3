"""The files of a checkpoint -> tensors, and tensors -> safetensors, one shard at a time."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kernels.precision import Progress
from models.checkpoints.files import read_json, refuse_lfs_pointer, write_json
from models.family import ImportRefused

MAX_SHARD_BYTES = 1_000_000_000  # of an output shard; it is held in memory until it is full
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
SHARD_NAME = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its shard's header describes it, before its data is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: Path

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def find_shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, in order; safetensors rather than pickles if a folder has both."""
    for single in SINGLE_FILES:
        index = folder / f"{single}.index.json"
        if index.is_file():
            shards = _indexed_shards(index)
        elif (folder / single).is_file():
            shards = [folder / single]
        else:
            continue
        for shard in shards:
            refuse_lfs_pointer(shard)
        return shards
    if any(SHARD_NAME.fullmatch(path.name) for path in folder.iterdir()):
        raise ImportRefused(f"{folder} has weight shards but no index (*.index.json): download the index as well")
    raise ImportRefused(f"{folder} has no weights ({' or '.join(SINGLE_FILES)}, whole or in shards with an index)")


def _indexed_shards(index: Path) -> list[Path]:
    weight_map: object = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ImportRefused(f"{index} lists no weights: download it again")
    names = sorted({str(name) for name in cast("dict[str, object]", weight_map).values()})
    for name in names:
        if name != Path(name).name:
            raise ImportRefused(f"{index} names {name!r}, which is not a file in this folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ImportRefused(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards listed by {index.name}: "
            f"{', '.join(missing)}; download the rest"
        )
    return [index.parent / name for name in names]


def inspect_shards(shards: list[Path]) -> dict[str, TensorInfo]:
    """Every tensor's name, shape and type, without reading the weights. Raises ImportRefused for duplicates."""
    found: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, tensor in read_shard(shard):
            if name in found:
                raise ImportRefused(f"tensor {name} is both in {found[name].shard.name} and in {shard.name}")
            found[name] = TensorInfo(tuple(tensor.shape), tensor.dtype, shard)
    return found


def read_tensors(shards: Sequence[Path], progress: Progress, what: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all shards, see `read_shard`. `what`: the label of progress, by default the shard's name."""
    total, done = sum(shard.stat().st_size for shard in shards), 0
    for shard in shards:
        end = done + shard.stat().st_size
        for name, tensor in read_shard(shard):
            yield name, tensor
            done = min(done + tensor.nbytes, end)
            progress(done, total, what or shard.name)
        done = end
    progress(total, total, what or shards[-1].name)


def read_shard(shard: Path) -> Iterator[tuple[str, Tensor]]:
    """One shard's tensors, mapped from the file if its format allows; each is valid until the next one is read."""
    if shard.suffix == ".safetensors":
        yield from _read_safetensors(shard)
    else:
        yield from _read_pickle(shard).items()


def _read_safetensors(shard: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        opened: Any = safe_open(shard, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ImportRefused(f"{shard} is damaged or incomplete ({error}): download it again") from None
    with opened as reader:
        for name in list(reader.keys()):
            yield name, reader.get_tensor(name)


def _read_pickle(shard: Path) -> dict[str, Tensor]:
    """The state dict of a `.bin` file. Only plain tensors are unpickled, so the file cannot run code."""
    try:
        content = _load_pickle(shard)
    except pickle.UnpicklingError:
        raise ImportRefused(f"{shard} holds more than plain tensors, or is damaged: it is not loaded") from None
    except (RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ImportRefused(f"{shard} is damaged or incomplete ({reason}): download it again") from None
    if not isinstance(content, dict):
        raise ImportRefused(f"{shard} does not hold a dictionary of tensors")
    for name, tensor in cast("dict[object, object]", content).items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ImportRefused(f"{shard} holds {str(name)[:80]!r}, which is not a plain tensor")
    return cast("dict[str, Tensor]", content)


def _load_pickle(shard: Path) -> object:
    try:
        return torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # the format before torch 1.6 cannot be mapped; it is read whole
        return torch.load(shard, map_location="cpu", weights_only=True)


@dataclass
class ShardWriter:
    """Collects tensors and writes them as safetensors of at most `max_bytes`, with an index if there are several.

    Holds one shard in memory. `finish` renames the files: the names contain the number of shards.
    """

    folder: Path
    max_bytes: int = MAX_SHARD_BYTES
    total_bytes: int = 0
    _pending: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _pending_bytes: int = 0
    _shard_of: dict[str, int] = field(default_factory=dict[str, int])
    _num_shards: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        num_bytes = tensor.nbytes
        if self._pending and self._pending_bytes + num_bytes > self.max_bytes:
            self._flush()
        # a copy: the source is a view of a file that is about to be closed
        self._pending[name] = tensor.clone(memory_format=torch.contiguous_format)
        self._pending_bytes += num_bytes
        self.total_bytes += num_bytes

    def finish(self) -> None:
        if self._pending:
            self._flush()
        names = [f"model-{i + 1:05d}-of-{self._num_shards:05d}.safetensors" for i in range(self._num_shards)]
        if self._num_shards == 1:
            names = ["model.safetensors"]
        for i, name in enumerate(names):
            self._part(i).rename(self.folder / name)
        if self._num_shards > 1:
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {tensor: names[shard] for tensor, shard in self._shard_of.items()},
            }
            write_json(self.folder / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        path = self._part(self._num_shards)
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise ImportRefused(f"{path} could not be written ({error})") from None
        path.chmod(0o644)  # save_file leaves 0600, which another user's server cannot read
        self._shard_of.update(dict.fromkeys(self._pending, self._num_shards))
        self._num_shards += 1
        self._pending.clear()
        self._pending_bytes = 0

    def _part(self, shard: int) -> Path:
        return self.folder / f"part-{shard:05d}.safetensors"
