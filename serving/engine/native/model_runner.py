"""Scheduled rows -> sampled tokens and pooled vectors: one step's forward pass and sampling.

A step waits for a GPU once, when the sampled tokens are copied to the host. Everything else is enqueued before, and
what is read after that copy is there already.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engine.interface import (
    CAUSAL,
    CausalLM,
    PromptLayout,
    RaggedBatch,
    SamplingParams,
    Span,
    TrainedPrefix,
)
from serving.engine.native.attention import AttentionSpan, StepAttention
from serving.engine.native.attention_cuda import TRITON, choose_kernel, step_attention
from serving.engine.native.block_manager import BlockCopy
from serving.engine.native.cuda_graphs import CaptureFunction, DecodeGraphs, Rows
from serving.engine.native.device import numbers_to_device, to_device
from serving.engine.native.kv_memory import KVMemory
from serving.engine.native.prompt_lookup import MAX_DECODING, MAX_DRAFT
from serving.engine.native.sampler import SampledToken, Sampler
from serving.engine.native.scheduler import ScheduledSequence, SchedulerOutput
from serving.engine.native.sequence import BLOCK, SequenceState, placeholders
from serving.engine.outputs import PoolingOutput
from serving.safe_traceback import where_from

logger = logging.getLogger(__name__)

StepResults = list[tuple[ScheduledSequence, list[SampledToken] | PoolingOutput]]


@dataclass(frozen=True)
class PooledRows:
    """Rows `first:last` of a batch belong to the mean of this sequence."""

    scheduled: ScheduledSequence
    first: int
    last: int


@dataclass(frozen=True)
class StepBatch:
    """The rows of one forward pass and which of them are sampled."""

    rows: Rows
    spans: tuple[AttentionSpan, ...]
    sampled_rows: list[int]  # the last row of every sequence in `sampled`, and its draft's
    sampled: tuple[ScheduledSequence, ...]
    pooled: tuple[PooledRows, ...]


class ModelRunner:
    """Owns the network, the KV memory and the sampler. Called by the engine thread only, but for `warm_up`."""

    def __init__(
        self,
        network: CausalLM,
        kv_tokens: int,
        max_sequences: int = 1,
        capture: CaptureFunction | None = None,
        kv_dtype: torch.dtype | None = None,
        num_trained: int = 0,
    ) -> None:
        """capture: how decode steps of up to `max_sequences` answers are captured; None runs each step eagerly.
        num_trained: tokens of a trained prefix, which `write_prefix` gets."""
        self._num_trained = num_trained
        self._network = network
        self._memory = KVMemory(network.shape, kv_tokens // BLOCK, network.device, kv_dtype or network.dtype)
        self._sampler = Sampler(network.shape.num_tokens, network.device)
        self._sums: dict[SequenceState, Tensor] = {}  # [hidden_size] float32 of the rows so far, for texts to be pooled
        self._kernel = choose_kernel(network.device, self._memory.keys.dtype, network.shape.head_dim)
        self._is_packed = capture is not None or network.device.type == "cuda"
        self.graphs: DecodeGraphs | None = None
        can_capture = self._kernel is TRITON or network.device.type != "cuda"
        if capture and can_capture and network.layout((0, 0)) == CAUSAL:
            max_rows = max(max_sequences, min(max_sequences, MAX_DECODING) * (1 + MAX_DRAFT))
            self.graphs = DecodeGraphs(network, self._memory, self._kernel, capture, max_rows, num_trained)

    def layout(self, prompt_ids: Sequence[int]) -> PromptLayout:
        return self._network.layout(prompt_ids)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Everything that can be done before the first request. Returns within a minute."""
        if self.graphs:
            self.graphs.capture_all()

    @torch.inference_mode()
    def write_prefix(self, prefix: TrainedPrefix, blocks: Sequence[int]) -> None:
        """Its keys and values into these blocks."""
        device = self._network.device
        places = torch.arange(prefix.num_tokens, device=device)
        numbers = torch.tensor(blocks, device=device)[places // BLOCK]
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            self._memory.store(layer, numbers, places % BLOCK, keys.to(device), values.to(device))

    @torch.inference_mode()
    def copy(self, copies: Iterable[BlockCopy]) -> None:
        """Copy blocks, in order."""
        for each in copies:
            self._memory.copy(each.source, each.target)

    @torch.inference_mode()
    def run(self, scheduler_output: SchedulerOutput) -> StepResults:
        """Run a step, whose copies were made. For every sequence that reaches its end or fails: a vector, or the
        token after its rows and those after each token of its draft.

        If it raises, the same rows can run again, after `recover`: only their own places in the cache were written.
        """
        batch = build_batch(scheduler_output.scheduled)
        hidden, logits = self._forward(scheduler_output, batch)
        sums = self._pool(hidden, batch.pooled)
        chunks, is_finite = _unfinished(hidden, scheduler_output.scheduled)
        owners = [each.sequence for each in batch.sampled for _ in range(1 + len(each.draft))]
        tokens = iter(self._sampler.sample(logits, owners) if owners else [])
        results: StepResults = [(each, [next(tokens) for _ in range(1 + len(each.draft))]) for each in batch.sampled]
        for each, total in sums:
            if each.is_sampled and each.sequence.pooled is not None:
                results.append((each, PoolingOutput(tuple((total / len(each.sequence.pooled)).tolist()))))
        if is_finite is not None:
            pairs = zip(chunks, is_finite.tolist(), strict=True)
            results += [(chunk, [SampledToken(None)]) for chunk, good in pairs if not good]
        self._sums |= {each.sequence: total for each, total in sums}  # last, so that a step that raises can run again
        return results

    def can_compute(self, token_id: int) -> bool:
        """Whether the device can compute one token and sample after it. Writes into the block of no sequence."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        num_blocks = 1 + self._num_trained // BLOCK
        trial = SequenceState(
            [*placeholders(self._num_trained), token_id],
            sampling,
            self.layout([token_id]),
            num_trained=self._num_trained,
            num_computed=self._num_trained,
            blocks=[self._memory.scratch_block] * num_blocks,
        )
        try:
            ((_, result),) = self.run(SchedulerOutput((), (), (ScheduledSequence(trial, 1),)))
        except Exception as error:  # noqa: BLE001
            logger.error("the device could not compute one token: %s", where_from(error))
            return False
        return isinstance(result, list) and not result[0].is_fault

    def forget(self, sequence: SequenceState) -> None:
        self._sampler.forget(sequence)
        self._sums.pop(sequence, None)

    def recover(self, sequences: Iterable[SequenceState]) -> None:
        """After a step of these sequences that failed: their penalties are counted anew; frees unused memory."""
        for sequence in sequences:
            self._sampler.forget(sequence)
        if self._network.device.type == "cuda":
            torch.cuda.empty_cache()

    def _forward(self, scheduler_output: SchedulerOutput, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Hidden states of all rows, logits of the sampled ones."""
        device, rows = self._network.device, batch.rows
        all_sampled = len(batch.sampled_rows) == len(rows.token_ids)
        sampled_rows = None if all_sampled else numbers_to_device(batch.sampled_rows, device)
        if self.graphs and not scheduler_output.chunks and self.graphs.can_run(rows):
            results = self.graphs.run(rows)
            if results is not None:
                hidden, logits = results
                return hidden, logits if sampled_rows is None else logits[sampled_rows]
        numbers = to_device(torch.tensor((rows.token_ids, rows.indices), dtype=torch.int64), device)
        token_ids, indices = numbers.unbind(0)
        ragged = RaggedBatch(
            token_ids, indices - self._num_trained, tuple(Span(s.first, s.last, s.layout) for s in batch.spans)
        )
        if self._is_packed:
            attend = step_attention(self._memory, batch.spans, len(scheduler_output.decoding), self._kernel)
        else:
            attend = StepAttention(self._memory, batch.spans)
        hidden = self._network.forward(ragged, attend)
        if not batch.sampled_rows:
            return hidden, hidden[:0]
        return hidden, self._network.logits(hidden if sampled_rows is None else hidden[sampled_rows])

    def _pool(self, hidden: Tensor, pooled: tuple[PooledRows, ...]) -> list[tuple[ScheduledSequence, Tensor]]:
        """The sum of each text's rows up to and with this step's: [hidden_size] float32, still on the device."""
        sums: list[tuple[ScheduledSequence, Tensor]] = []
        for rows in pooled:
            total = hidden[rows.first : rows.last].float().sum(dim=0)
            sequence = rows.scheduled.sequence
            if sequence.num_computed > self._num_trained:  # else the first chunk, perhaps again after a preemption
                total += self._sums[sequence]
            sums.append((rows.scheduled, total))
        return sums


def build_batch(scheduled: tuple[ScheduledSequence, ...]) -> StepBatch:
    """Concatenate the rows of all scheduled sequences."""
    rows = Rows([], [], [], all(each.sequence.layout == CAUSAL for each in scheduled))
    spans: list[AttentionSpan] = []
    sampled_rows: list[int] = []
    pooled: list[PooledRows] = []
    for each in scheduled:
        sequence, first = each.sequence, len(rows.token_ids)
        begin = sequence.num_computed
        end = begin + each.num_rows + len(each.draft)
        rows.token_ids.extend(sequence.token_ids[begin : begin + each.num_rows])
        rows.token_ids.extend(each.draft)
        rows.indices.extend(range(begin, end))
        rows.tables.extend([sequence.blocks] * (end - begin))
        last = len(rows.token_ids)
        spans.append(AttentionSpan(first, last, sequence.blocks, end, sequence.layout, sequence.num_trained))
        if sequence.pooled is not None:
            counted = max(begin, sequence.pooled.start)
            stop = max(counted, min(end, sequence.pooled.stop))
            pooled.append(PooledRows(each, first + counted - begin, first + stop - begin))
        elif each.is_sampled:
            sampled_rows += range(first + each.num_rows - 1, last)
    return StepBatch(
        rows=rows,
        spans=tuple(spans),
        sampled_rows=sampled_rows,
        sampled=tuple(each for each in scheduled if each.is_sampled and each.sequence.pooled is None),
        pooled=tuple(pooled),
    )


def _unfinished(
    hidden: Tensor, scheduled: tuple[ScheduledSequence, ...]
) -> tuple[list[ScheduledSequence], Tensor | None]:
    """The chunks of unfinished prompts, and whether the hidden states after each are finite.

    Where they are not, the chunk fails here, before other requests can reuse its keys and values: where a later token
    is NaN, attention kernels give NaN for earlier ones too (0 * NaN), and those may be a prefix that others share.
    """
    rows, chunks, stop = list[int](), list[ScheduledSequence](), 0
    for each in scheduled:
        stop += each.num_rows + len(each.draft)
        if not each.is_sampled:
            rows.append(stop - 1)
            chunks.append(each)
    if not chunks:
        return [], None
    return chunks, torch.isfinite(hidden[numbers_to_device(rows, hidden.device)]).all(dim=-1)
