"""From a plan to tensors: which ids, at which index of their sequence, stored at which place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.engine.interface import CAUSAL, RaggedBatch, Span
from serving.engine.native.attention import AttentionSpan
from serving.engine.native.scheduler import ScheduledSequence
from serving.engine.native.transfer import send


@dataclass(frozen=True)
class PooledRows:
    """Rows `first:last` of a batch belong to the mean of this work's sequence."""

    work: ScheduledSequence
    first: int
    last: int


@dataclass(frozen=True)
class Rows:
    """What each row of a step is, on the host."""

    token_ids: list[int]
    indices: list[int]  # in their own sequence, from 0
    places: list[int]  # where keys and values are stored
    starts: list[int]  # the first place of their sequence
    is_causal: bool  # whether every sequence's tokens see only what is before them


@dataclass(frozen=True)
class StepBatch:
    """The rows of one forward pass and which of them are sampled."""

    rows: Rows
    spans: tuple[AttentionSpan, ...]
    sampled_rows: list[int]  # of every work item in `sampled`, its last row and its draft's
    sampled: tuple[ScheduledSequence, ...]
    pooled: tuple[PooledRows, ...]

    def on(self, device: torch.device) -> tuple[RaggedBatch, torch.Tensor]:
        """What the network sees, and [rows] int64, the rows' places."""
        rows = self.rows
        numbers = send(torch.tensor((rows.token_ids, rows.indices, rows.places), dtype=torch.int64), device)
        spans = tuple(Span(s.first, s.last, s.layout) for s in self.spans)
        return RaggedBatch(numbers[0], numbers[1], spans), numbers[2]


def build(work: tuple[ScheduledSequence, ...]) -> StepBatch:
    """Lay the work's rows end to end."""
    rows = Rows([], [], [], [], all(item.sequence.layout == CAUSAL for item in work))
    spans: list[AttentionSpan] = []
    sampled_rows: list[int] = []
    pooled: list[PooledRows] = []
    for item in work:
        sequence, first = item.sequence, len(rows.token_ids)
        begin = sequence.num_computed
        end = begin + item.num_rows + len(item.draft)
        assert sequence.extent is not None, "the scheduler reserved the places"
        start = sequence.extent.start
        rows.token_ids.extend(sequence.token_ids[begin : begin + item.num_rows])
        rows.token_ids.extend(item.draft)
        rows.indices.extend(range(begin, end))
        rows.places.extend(range(start + begin, start + end))
        rows.starts.extend([start] * (end - begin))
        last = len(rows.token_ids)
        spans.append(AttentionSpan(first, last, start, end, sequence.layout))
        if sequence.pooled is not None:
            counted = max(begin, sequence.pooled.start)
            stop = max(counted, min(end, sequence.pooled.stop))
            pooled.append(PooledRows(item, first + counted - begin, first + stop - begin))
        elif item.samples:
            sampled_rows += range(first + item.num_rows - 1, last)
    return StepBatch(
        rows=rows,
        spans=tuple(spans),
        sampled_rows=sampled_rows,
        sampled=tuple(item for item in work if item.samples and item.sequence.pooled is None),
        pooled=tuple(pooled),
    )
