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
    last_rows: torch.Tensor  # [sampled] int64: the last row of every work item that samples, in order
    sampled: tuple[Work, ...]
    pooled: tuple[PooledRows, ...]


def build(work: tuple[Work, ...], device: torch.device) -> StepBatch:
    """Lay the work's rows end to end."""
    token_ids: list[int] = []
    indices: list[int] = []
    places: list[int] = []
    spans: list[AttentionSpan] = []
    last_rows: list[int] = []
    pooled: list[PooledRows] = []
    for item in work:
        sequence, first = item.sequence, len(token_ids)
        begin = sequence.num_computed
        end = begin + item.num_rows
        assert sequence.extent is not None and end <= sequence.extent.capacity, "the scheduler reserved the places"
        token_ids += sequence.token_ids[begin:end]
        indices += range(begin, end)
        places += range(sequence.extent.start + begin, sequence.extent.start + end)
        spans.append(AttentionSpan(first, len(token_ids), sequence.extent.start, end, sequence.layout))
        if sequence.pooled is not None:
            start = max(begin, sequence.pooled.start)
            stop = max(start, min(end, sequence.pooled.stop))
            pooled.append(PooledRows(item, first + start - begin, first + stop - begin))
        elif item.samples:
            last_rows.append(len(token_ids) - 1)
    numbers = torch.tensor((token_ids, indices, places), dtype=torch.int64).to(device, non_blocking=True)
    return StepBatch(
        ragged=RaggedBatch(numbers[0], numbers[1], tuple(Span(s.first, s.last, s.layout) for s in spans)),
        spans=tuple(spans),
        places=numbers[2],
        last_rows=torch.tensor(last_rows, dtype=torch.int64).to(device, non_blocking=True),
        sampled=tuple(item for item in work if item.samples and item.sequence.pooled is None),
        pooled=tuple(pooled),
    )
