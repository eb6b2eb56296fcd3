"""One step on the device: cache moves, forward pass, sampling. Knows tensors; decides nothing."""

from __future__ import annotations

from collections.abc import Sequence as Ids

import torch

from serving.engine import batch
from serving.engine.attention import KVMemory, StepAttention
from serving.engine.sampler import Sampled, Sampler
from serving.engine.scheduler import StepPlan, Work
from serving.engine.sequence import Sequence
from serving.engine.types import CausalLM, PromptLayout


class Runner:
    """Owns the network, the KV memory and the sampler. Called by the engine thread only."""

    def __init__(self, network: CausalLM, kv_tokens: int) -> None:
        self._network = network
        self._memory = KVMemory(network.shape, kv_tokens, network.device, network.dtype)
        self._sampler = Sampler(network.shape.num_tokens, network.device)

    def layout(self, prompt_ids: Ids[int]) -> PromptLayout:
        return self._network.layout(prompt_ids)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[tuple[Work, Sampled]]:
        """Carry out a plan; a sampled token for every work item that reaches its sequence's end."""
        self._memory.carry_out(plan.moves)
        step = batch.build(plan.work, self._network.device)
        attend = StepAttention(self._memory, step.spans, step.places)
        hidden = self._network.forward(step.ragged, attend)
        if not step.sampled:
            return []
        logits = self._network.logits(hidden[step.last_rows])
        sampled = self._sampler.sample(logits, [work.sequence for work in step.sampled])
        return list(zip(step.sampled, sampled, strict=True))

    def forget(self, sequence: Sequence) -> None:
        self._sampler.forget(sequence)
