"""The plug: what a family file provides. Knows the two sockets, not the server behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.precision import Precision, Progress

if TYPE_CHECKING:
    import torch

    from serving.engine.interface import CausalLM
    from serving.generation.interface import ChatFormat


class ImportRefused(Exception):
    """This folder cannot be imported; the message is one clear line for a person."""


@dataclass(frozen=True)
class ImportOption:
    """A choice that a family needs a person to make (`--NAME VALUE` of the import command)."""

    name: str
    help: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedNetwork:
    """A stored model, ready to be pushed into the server."""

    network: CausalLM
    chat_format: ChatFormat


@dataclass(frozen=True)
class Family:
    """One kind of model.

    import_checkpoint(source, target, options, progress): reads the checkpoint folder `source`, writes everything the
    server needs into the empty folder `target` and returns the metadata that `load` will want (JSON values only).
    Raises ImportRefused. `options` holds only names listed in `options` below.
    load(folder, metadata, device, precision, progress): opens such a folder again. No network access, no remote code.
    open_format(folder): the chat format alone, for an engine of another kind that loads the network by itself, from
    the transformers folder that the import wrote. None where the network is not transformers' own.
    """

    name: str
    title: str
    import_checkpoint: Callable[[Path, Path, Mapping[str, str], Progress], dict[str, Any]]
    load: Callable[[Path, Mapping[str, Any], torch.device, Precision, Progress], LoadedNetwork]
    options: tuple[ImportOption, ...] = ()
    open_format: Callable[[Path], ChatFormat] | None = None
