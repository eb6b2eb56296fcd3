"""A stored folder that transformers loads -> a LoadedNetwork. Shared by every family but ChatGLM-6B."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.precision import Precision, Progress
from models.family import LoadedNetwork

if TYPE_CHECKING:
    import torch

    from serving.generation.interface import ChatFormat

Load = Callable[[Path, Mapping[str, Any], "torch.device", Precision, Progress], LoadedNetwork]


def load_with(open_format: Callable[[Path], ChatFormat]) -> Load:
    """The function `Family.load` of a family with this `Family.open_format`."""

    def load(
        folder: Path, metadata: Mapping[str, Any], device: torch.device, precision: Precision, progress: Progress
    ) -> LoadedNetwork:
        from models.checkpoints.open_decoder import open_decoder  # transformers takes seconds to import
        from models.checkpoints.ptuning import load_prefix

        chat_format = open_format(folder)
        max_positions = int(metadata["context_length"])
        network = open_decoder(folder, device, precision, progress, chat_format.num_tokens, max_positions)
        return LoadedNetwork(network, chat_format, load_prefix(folder))

    return load
