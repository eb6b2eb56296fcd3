"""One step on the device: cache moves, forward pass, sampling, pooling. Knows tensors; decides nothing.

A step waits for a GPU once, when the sampled tokens are copied to the host. Everything else is told to the device
before, and what is read after that copy is there already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engine.interface import CAUSAL, CanPrepare, CausalLM, PoolingOutput, PromptLayout
from serving.engine.native import batch
from serving.engine.native.attention import KVMemory, StepAttention
from serving.engine.native.attention_cuda import FLASH, choose_kernel, step_attention
from serving.engine.native.cuda_graphs import DecodeGraphs, Recorder
from serving.engine.native.isolation import sample_isolated
from serving.engine.native.kv_cache import GRANULE
from serving.engine.native.prompt_lookup import MAX_DECODING, MAX_DRAFT
from serving.engine.native.sampler import SampledToken, Sampler
from serving.engine.native.scheduler import ScheduledSequence, SchedulerOutput
from serving.engine.native.sequence import SequenceState
from serving.engine.native.transfer import send_numbers


class ModelRunner:
    """Owns the network, the KV memory and the sampler. Called by the engine thread only, but for `prepare`."""

    def __init__(
        self,
        network: CausalLM,
        kv_tokens: int,
        max_sequences: int = 1,
        record: Recorder | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """record: how decode steps of up to `max_sequences` answers are recorded; None computes each step anew."""
        self._network = network
        self._memory = KVMemory(
            network.shape, kv_tokens + GRANULE * bool(record), network.device, kv_dtype or network.dtype
        )
        self._sampler = Sampler(network.shape.num_tokens, network.device)
        self._sums: dict[SequenceState, Tensor] = {}  # [hidden_size] float32 of the rows so far, for texts to be pooled
        self._kernel = choose_kernel(network.device, self._memory.keys.dtype)
        self._is_packed = record is not None or network.device.type == "cuda"
        self.graphs: DecodeGraphs | None = None
        can_record = self._kernel is FLASH or network.device.type != "cuda"
        if record and can_record and network.layout((0, 0)) == CAUSAL:
            max_rows = max(max_sequences, min(max_sequences, MAX_DECODING) * (1 + MAX_DRAFT))
            self.graphs = DecodeGraphs(network, self._memory, self._kernel, record, max_rows, scratch=kv_tokens)

    def layout(self, prompt_ids: Sequence[int]) -> PromptLayout:
        return self._network.layout(prompt_ids)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Everything that can be done before the first request. Returns within a minute."""
        if self.graphs:
            if isinstance(self._network, CanPrepare):
                self._network.prepare()
            self.graphs.prepare()

    @torch.inference_mode()
    def run(self, plan: SchedulerOutput) -> list[tuple[ScheduledSequence, list[SampledToken] | PoolingOutput]]:
        """Carry out a plan; for every work item that reaches its sequence's end or fails, a vector, or the token after
        it and those after each token of its draft."""
        self._memory.carry_out(plan.moves)
        step = batch.build(plan.work)
        hidden, logits = self._forward(plan, step)
        sums = self._pool(hidden, step.pooled)
        parts, finite = _unfinished(hidden, plan.work)
        owners = [work.sequence for work in step.sampled for _ in range(1 + len(work.draft))]
        sampled = iter(sample_isolated(self._sampler, logits, owners) if owners else [])
        done: list[tuple[ScheduledSequence, list[SampledToken] | PoolingOutput]] = [
            (work, [next(sampled) for _ in range(1 + len(work.draft))]) for work in step.sampled
        ]
        done += [(work, PoolingOutput(tuple(mean.tolist()))) for work, mean in sums]
        if finite is not None:
            done += [
                (part, [SampledToken(None)]) for part, good in zip(parts, finite.tolist(), strict=True) if not good
            ]
        return done

    def forget(self, sequence: SequenceState) -> None:
        self._sampler.forget(sequence)
        self._sums.pop(sequence, None)

    def recover(self) -> None:
        """Give unused memory back to the device after a step that failed."""
        self._sums.clear()
        if self._network.device.type == "cuda":
            torch.cuda.empty_cache()

    def _forward(self, plan: SchedulerOutput, step: batch.StepBatch) -> tuple[Tensor, Tensor]:
        """Hidden states of all rows, logits of the sampled ones."""
        device = self._network.device
        all_sampled = len(step.sampled_rows) == len(step.rows.token_ids)
        sampled_rows = None if all_sampled else send_numbers(step.sampled_rows, device)
        if self.graphs and not plan.chunks and self.graphs.can_run(step.rows):
            decoded = self.graphs.run(step.rows)
            if decoded is not None:
                return decoded.hidden, decoded.logits if sampled_rows is None else decoded.logits[sampled_rows]
        ragged, places = step.on(device)
        if self._is_packed:
            attend = step_attention(self._memory, step.spans, len(plan.decoding), places, self._kernel)
        else:
            attend = StepAttention(self._memory, step.spans, places)
        hidden = self._network.forward(ragged, attend)
        if not step.sampled_rows:
            return hidden, hidden[:0]
        return hidden, self._network.logits(hidden if sampled_rows is None else hidden[sampled_rows])

    def _pool(self, hidden: Tensor, pooled: tuple[batch.PooledRows, ...]) -> list[tuple[ScheduledSequence, Tensor]]:
        """Add a step's rows to their texts' sums; the mean of every text that is complete, still on the device."""
        done: list[tuple[ScheduledSequence, Tensor]] = []
        for rows in pooled:
            sequence = rows.work.sequence
            total = hidden[rows.first : rows.last].float().sum(dim=0)
            if sequence.num_computed > 0:  # else the first chunk, perhaps again after a preemption
                total += self._sums[sequence]
            self._sums[sequence] = total
            if rows.work.samples and sequence.pooled is not None:
                done.append((rows.work, total / len(sequence.pooled)))
        return done


def _unfinished(hidden: Tensor, work: tuple[ScheduledSequence, ...]) -> tuple[list[ScheduledSequence], Tensor | None]:
    """The chunks of unfinished prompts, and whether the numbers after each are finite.

    Where they are not, the chunk fails here, before other requests can take over what it left in the cache: where a
    later token is NaN, attention kernels give NaN for earlier ones too (0 * NaN), and those may be a beginning that
    others share.
    """
    rows, parts, stop = list[int](), list[ScheduledSequence](), 0
    for item in work:
        stop += item.num_rows + len(item.draft)
        if not item.samples:
            rows.append(stop - 1)
            parts.append(item)
    if not parts:
        return [], None
    return parts, torch.isfinite(hidden[send_numbers(rows, hidden.device)]).all(dim=-1)
