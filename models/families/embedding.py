"""Encoders and decoders that were trained to embed texts: bge, e5, MiniLM, Qwen3-Embedding and their relatives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.precision import Precision, Progress
from models.family import Family, ImportOption, ImportRefused, LoadedEncoder

if TYPE_CHECKING:
    import torch

OPTIONS = (
    ImportOption("query-prompt", "text in front of queries, if the folder does not name it (e5: 'query: ')"),
    ImportOption("document-prompt", "text in front of documents, if the folder does not name it (e5: 'passage: ')"),
    ImportOption("dimensions", "widths that the vectors may be shortened to (Matryoshka), separated by commas"),
)


def _import_checkpoint(source: Path, target: Path, options: Mapping[str, str], progress: Progress) -> dict[str, Any]:
    from models.checkpoints.encoder import import_encoder

    widths = [width.strip() for width in options.get("dimensions", "").split(",") if width.strip()]
    if not all(width.isdecimal() and int(width) for width in widths):
        raise ImportRefused(f"--dimensions must be numbers separated by commas, not {options['dimensions']!r}")
    metadata = import_encoder(source, target, progress, is_reranker=False)
    for kind in ("query", "document"):
        if text := options.get(f"{kind}-prompt"):
            metadata["prompts"][kind] = text
    return metadata | {"dimensions": [int(width) for width in widths]}


def load(
    folder: Path, metadata: Mapping[str, Any], device: torch.device, precision: Precision, progress: Progress
) -> LoadedEncoder:
    """See models.family.Family. Shared with the family `reranker`."""
    from models.checkpoints.encoder import TOKENIZER_FILE, open_encoder
    from models.tokenizers.encoder import EncoderTokenizer

    network = open_encoder(folder, metadata, device, precision)
    return LoadedEncoder(
        network,
        EncoderTokenizer(folder / TOKENIZER_FILE),
        dict(metadata.get("prompts") or {}),
        metadata.get("default_prompt"),
        tuple(metadata.get("dimensions") or ()),
    )


FAMILY = Family(
    name="embedding",
    title="models that embed texts (bge, e5, MiniLM, Qwen3-Embedding)",
    import_checkpoint=_import_checkpoint,
    load=load,
    options=OPTIONS,
    abilities=frozenset({"embeddings"}),
)
