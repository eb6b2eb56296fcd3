"""The interface of a model family: checkpoint folder -> stored model -> LoadedNetwork."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from kernels.precision import Precision, Progress

if TYPE_CHECKING:
    import torch

    from serving.engine.interface import CausalLM, Encoder, TrainedPrefix
    from serving.generation.interface import ChatFormat, EncoderTokenizer


class ImportRefused(Exception):
    """This folder cannot be imported or loaded; the message is one line for the operator."""


@dataclass(frozen=True)
class ImportOption:
    """A choice that the checkpoint leaves to the operator: `--NAME VALUE` of the import command."""

    name: str
    help: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedNetwork:
    """A stored model in memory: what an engine computes with, and what turns conversations into its ids."""

    network: CausalLM
    chat_format: ChatFormat
    prefix: TrainedPrefix | None = None


@dataclass(frozen=True)
class LoadedEncoder:
    """A stored encoder in memory. The last three: see serving.generation.encoder.RunningEncoder."""

    network: Encoder
    tokenizer: EncoderTokenizer
    prompts: Mapping[str, str]
    default_prompt: str | None
    dimensions: tuple[int, ...]


LoadedT = TypeVar("LoadedT", LoadedNetwork, LoadedEncoder)


@dataclass(frozen=True)
class Family(Generic[LoadedT]):
    """One kind of model.

    import_checkpoint(source, target, options, progress): reads the checkpoint folder `source`, writes everything that
    serving needs into the empty folder `target`, and returns the metadata that `load` needs (JSON values only). Raises
    ImportRefused. The names in `options` are those of the field `options`.
    load(folder, metadata, device, precision, progress): opens such a folder. No network access, no remote code.
    open_format(folder): the chat format alone, for an engine that loads the network by itself (vLLM). None if the
    network is not one of transformers'.
    abilities: what its models can do.
    """

    name: str
    title: str
    import_checkpoint: Callable[[Path, Path, Mapping[str, str], Progress], dict[str, Any]]
    load: Callable[[Path, Mapping[str, Any], torch.device, Precision, Progress], LoadedT]
    options: tuple[ImportOption, ...] = ()
    open_format: Callable[[Path], ChatFormat] | None = None
    abilities: frozenset[Literal["chat", "embeddings", "rerank"]] = frozenset({"chat", "embeddings"})
