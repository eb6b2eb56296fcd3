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
    def run(self, plan: StepPlan) -> list[tuple[Work, list[Sampled] | Pooled]]:
        """Carry out a plan; for every work item that reaches its sequence's end or fails, a vector, or the token after
        it and those after each token of its draft."""
        self._memory.carry_out(plan.moves)
        step = batch.build(plan.work, self._network.device)
        attend = StepAttention(self._memory, step.spans, step.places)
        hidden = self._network.forward(step.ragged, attend)
        done: list[tuple[Work, list[Sampled] | Pooled]] = [
            *self._pool(hidden, step.pooled),
            *_broken(hidden, plan.work),
        ]
        if not step.sampled:
            return done
        logits = self._network.logits(hidden[step.sampled_rows])
        owners = [work.sequence for work in step.sampled for _ in range(1 + len(work.draft))]
        sampled = iter(sample_isolated(self._sampler, logits, owners))
        return [*((work, [next(sampled) for _ in range(1 + len(work.draft))]) for work in step.sampled), *done]

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


def _broken(hidden: Tensor, work: tuple[Work, ...]) -> list[tuple[Work, list[Sampled]]]:
    """The chunks of unfinished prompts after which numbers are not finite.

    They fail here, before other requests can take over what the chunk left in the cache: where a later token is NaN,
    attention kernels give NaN for earlier ones too (0 * NaN), and those may be a beginning that others share.
    """
    rows, parts, stop = list[int](), list[Work](), 0
    for item in work:
        stop += item.num_rows + len(item.draft)
        if not item.samples:
            rows.append(stop - 1)
            parts.append(item)
    if not parts:
        return []
    finite = torch.isfinite(hidden[rows]).all(dim=-1).tolist()
    return [(item, [Sampled(None)]) for item, is_finite in zip(parts, finite, strict=True) if not is_finite]
