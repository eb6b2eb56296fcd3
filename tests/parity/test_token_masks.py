"""Masks in the engine: one for each row, kept through preemption; a mask that raises fails its own request only."""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch import Tensor

from serving.engine.interface import EngineLimits, SamplingParams, TokenMask
from serving.engine.native.engine import NativeEngine
from serving.engine.outputs import RequestFailed
from tests.tiny import VOCABULARY, generate, generating, greedy, running, settled, tiny_model, tokens

MODEL = tiny_model(1)
NUM_WORDS = (VOCABULARY + 31) // 32


class Congruent:
    """Allows the tokens that are `offset` + n modulo `step` as the n-th of an answer: a mask with a state."""

    specification = "for engines in other processes"

    def __init__(self, step: int, offset: int = 0, fails_at: int | None = None) -> None:
        self._step, self._offset, self._fails_at = step, offset, fails_at
        self.accepted: list[int] = []

    def allowed(self) -> Tensor | None:
        if len(self.accepted) == self._fails_at:
            raise ValueError("no way on")
        first = (self._offset + len(self.accepted)) % self._step
        bits = torch.zeros(NUM_WORDS * 32, dtype=torch.int64)
        bits[first : VOCABULARY : self._step] = 1
        words = (bits.view(-1, 32) << torch.arange(32)).sum(dim=1)
        return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

    def accept(self, token_id: int) -> None:
        assert token_id % self._step == (self._offset + len(self.accepted)) % self._step
        self.accepted.append(token_id)


class Everything:
    """Allows every token."""

    specification = ""

    def allowed(self) -> Tensor | None:
        return None

    def accept(self, token_id: int) -> None: ...


def sampled(seed: int, max_tokens: int = 40) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=1.3, top_p=0.9, seed=seed)


async def masked(engine: NativeEngine, prompt: list[int], sampling: SamplingParams, mask: TokenMask) -> list[int]:
    async with generating(engine, prompt, [sampling], [mask]) as outputs:
        return [output.token_id async for _, output in outputs]


def test_masked_and_unmasked_rows_share_a_batch_and_keep_their_texts() -> None:
    prompts = [list(range(10 + i, 40 + 2 * i)) for i in range(6)]

    async def main() -> None:
        with running(MODEL.network, EngineLimits(kv_tokens=4096)) as engine:
            alone = [await tokens(engine, p, sampled(i)) for i, p in enumerate(prompts)]
            masked_alone = [await masked(engine, p, sampled(i), Congruent(7, i)) for i, p in enumerate(prompts)]
            both = await asyncio.gather(
                *(tokens(engine, p, sampled(i)) for i, p in enumerate(prompts)),
                *(masked(engine, p, sampled(i), Congruent(7, i)) for i, p in enumerate(prompts)),
            )
            assert both == [*alone, *masked_alone]
            assert masked_alone != alone
            assert await masked(engine, prompts[0], sampled(0), Everything()) == alone[0]
            assert await tokens(engine, prompts[0], greedy(20)) == MODEL.greedy(prompts[0], 20)

    asyncio.run(main())


def test_a_mask_keeps_its_state_through_preemption() -> None:
    prompts = [list(range(5 + i, 45 + i)) for i in range(5)]

    async def main() -> None:
        with running(MODEL.network, EngineLimits(kv_tokens=4096)) as engine:
            alone = [await masked(engine, p, sampled(i, 80), Congruent(5, i)) for i, p in enumerate(prompts)]
        with running(MODEL.network, EngineLimits(max_sequences=5, max_batch_tokens=64, kv_tokens=352)) as engine:
            masks = [Congruent(5, i) for i in range(5)]
            crowded = await asyncio.gather(
                *(masked(engine, p, sampled(i, 80), masks[i]) for i, p in enumerate(prompts))
            )
            assert engine.stats().preemptions > 0
            assert crowded == alone
            assert [mask.accepted for mask in masks] == alone

    asyncio.run(main())


def test_a_mask_that_fails_fails_its_own_request_only_and_never_the_engine() -> None:
    prompt = list(range(10, 40))

    async def main() -> None:
        with running(MODEL.network, EngineLimits(kv_tokens=4096)) as engine:
            expected = await tokens(engine, prompt, greedy(60))
            neighbour = asyncio.create_task(tokens(engine, prompt, greedy(60)))
            for fails_at in (0, 1, 5, 0, 0, 0, 0):
                with pytest.raises(RequestFailed):
                    await masked(engine, prompt, sampled(1), Congruent(3, fails_at=fails_at))
            assert await neighbour == expected
            await settled(engine)
            assert engine.is_alive
            assert len(await generate(engine, prompt, greedy(3))) == 3

    asyncio.run(main())


def test_log_probabilities_are_those_of_the_unmasked_distribution() -> None:
    prompt = list(range(10, 30))
    sampling = SamplingParams(max_tokens=1, temperature=0.0, num_top_logprobs=1)

    async def main() -> None:
        with running(MODEL.network, EngineLimits(kv_tokens=1024)) as engine:
            (free,) = await generate(engine, prompt, sampling)
            other = Congruent(VOCABULARY, (free.token_id + 1) % VOCABULARY)
            async with generating(engine, prompt, [sampling], [other]) as outputs:
                ((_, forced),) = [item async for item in outputs]
            assert forced.token_id == (free.token_id + 1) % VOCABULARY
            assert forced.logprob is not None
            assert free.logprob is not None
            assert forced.logprob.top[0][0] == free.token_id
            assert forced.logprob.logprob < free.logprob.logprob

    asyncio.run(main())
