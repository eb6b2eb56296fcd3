"""From a plan to tensors: which ids, at which index of their sequence, stored at which place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.engine.attention import AttentionSpan
from serving.engine.scheduler import Work
from serving.engine.types import RaggedBatch, Span


@dataclass(frozen=True)
class PooledRows:
    """Rows `first:last` of a batch belong to the mean of this work's sequence."""

    work: Work
    first: int
    last: int


@dataclass(frozen=True)
class StepBatch:
    """The rows of one forward pass and which of them are sampled."""

    ragged: RaggedBatch
    spans: tuple[AttentionSpan, ...]
    places: torch.Tensor  # [rows] int64
    sampled_rows: torch.Tensor  # [sampled rows] int64: of every work item in `sampled`, its last row and its draft's
    sampled: tuple[Work, ...]
    pooled: tuple[PooledRows, ...]


def build(work: tuple[Work, ...], device: torch.device) -> StepBatch:
    """Lay the work's rows end to end."""
    token_ids: list[int] = []
    indices: list[int] = []
    places: list[int] = []
    spans: list[AttentionSpan] = []
    sampled_rows: list[int] = []
    pooled: list[PooledRows] = []
    for item in work:
        sequence, first = item.sequence, len(token_ids)
        begin = sequence.num_computed
        end = begin + item.num_rows + len(item.draft)
        assert sequence.extent is not None, "the scheduler reserved the places"
        token_ids += sequence.token_ids[begin : begin + item.num_rows]
        token_ids += item.draft
        indices += range(begin, end)
        places += range(sequence.extent.start + begin, sequence.extent.start + end)
        spans.append(AttentionSpan(first, len(token_ids), sequence.extent.start, end, sequence.layout))
        if sequence.pooled is not None:
            start = max(begin, sequence.pooled.start)
            stop = max(start, min(end, sequence.pooled.stop))
            pooled.append(PooledRows(item, first + start - begin, first + stop - begin))
        elif item.samples:
            sampled_rows += range(first + item.num_rows - 1, len(token_ids))
    numbers = torch.tensor((token_ids, indices, places), dtype=torch.int64).to(device, non_blocking=True)
    return StepBatch(
        ragged=RaggedBatch(numbers[0], numbers[1], tuple(Span(s.first, s.last, s.layout) for s in spans)),
        spans=tuple(spans),
        places=numbers[2],
        sampled_rows=torch.tensor(sampled_rows, dtype=torch.int64).to(device, non_blocking=True),
        sampled=tuple(item for item in work if item.samples and item.sequence.pooled is None),
        pooled=tuple(pooled),
    )
