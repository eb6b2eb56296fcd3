"""Cross-encoders that score a query and a document together: bge-reranker and its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.precision import Progress
from models.families.embedding import load
from models.family import Family


def _import_checkpoint(source: Path, target: Path, options: Mapping[str, str], progress: Progress) -> dict[str, Any]:
    from models.checkpoints.encoder import import_encoder

    return import_encoder(source, target, progress, is_reranker=True)


FAMILY = Family(
    name="reranker",
    title="cross-encoders that score a query and a document (bge-reranker)",
    import_checkpoint=_import_checkpoint,
    load=load,
    abilities=frozenset({"rerank"}),
)
