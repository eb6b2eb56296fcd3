"""One step on the device: cache moves, forward pass, sampling, pooling. Knows tensors; decides nothing."""

from __future__ import annotations

from collections.abc import Sequence as Ids

import torch
from torch import Tensor

from serving.engine import batch
from serving.engine.attention import KVMemory, StepAttention
from serving.engine.isolation import sample_isolated
from serving.engine.sampler import Sampled, Sampler
from serving.engine.scheduler import StepPlan, Work
from serving.engine.sequence import Sequence
from serving.engine.types import CausalLM, Pooled, PromptLayout


class Runner:
    """Owns the network, the KV memory and the sampler. Called by the engine thread only."""

    def __init__(self, network: CausalLM, kv_tokens: int) -> None:
        self._network = network
        self._memory = KVMemory(network.shape, kv_tokens, network.device, network.dtype)
        self._sampler = Sampler(network.shape.num_tokens, network.device)
        self._sums: dict[Sequence, Tensor] = {}  # [hidden_size] float32 of the rows so far, for texts to be pooled

    def layout(self, prompt_ids: Ids[int]) -> PromptLayout:
        return self._network.layout(prompt_ids)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[tuple[Work, Sampled | Pooled]]:
        """Carry out a plan; a token or a vector for every work item that reaches its sequence's end."""
        self._memory.carry_out(plan.moves)
        step = batch.build(plan.work, self._network.device)
        attend = StepAttention(self._memory, step.spans, step.places)
        hidden = self._network.forward(step.ragged, attend)
        pooled = self._pool(hidden, step.pooled)
        if not step.sampled:
            return [*pooled]
        logits = self._network.logits(hidden[step.last_rows])
        sampled = sample_isolated(self._sampler, logits, [work.sequence for work in step.sampled])
        return [*zip(step.sampled, sampled, strict=True), *pooled]

    def forget(self, sequence: Sequence) -> None:
        self._sampler.forget(sequence)
        self._sums.pop(sequence, None)

    def recover(self) -> None:
        """Give unused memory back to the device after a step that failed."""
        self._sums.clear()
        if self._network.device.type == "cuda":
            torch.cuda.empty_cache()

    def _pool(self, hidden: Tensor, pooled: tuple[batch.PooledRows, ...]) -> list[tuple[Work, Pooled]]:
        """Add a step's rows to their texts' sums; the mean of every text that is complete."""
        done: list[tuple[Work, Pooled]] = []
        for rows in pooled:
            sequence = rows.work.sequence
            total = hidden[rows.first : rows.last].float().sum(dim=0)
            if sequence.num_computed > 0:  # else the first chunk, perhaps again after a preemption
                total += self._sums[sequence]
            self._sums[sequence] = total
            if rows.work.samples and sequence.pooled is not None:
                done.append((rows.work, Pooled(tuple((total / len(sequence.pooled)).tolist()))))
        return done
