"""The engine gives the tokens of `model.generate`, whatever shares the batch, the cache or the step."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.interface import (
    CAUSAL,
    AttentionFunction,
    EngineLimits,
    NetworkShape,
    PromptLayout,
    RaggedBatch,
    SamplingParams,
)
from serving.engine.outputs import EngineStopped, RequestTooLarge
from tests.tiny import VOCABULARY, TinyModel, generate, generating, greedy, running, settled, tiny_model, tokens

MODELS = {
    "grouped": tiny_model(1),
    "one key head": tiny_model(2, heads=4, kv_heads=1, layers=3),
    "as many key heads": tiny_model(3, heads=2, kv_heads=2, head_dim=24),
}


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCABULARY), k=length)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    jobs=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 90), st.integers(1, 60), st.integers(1, 30), st.integers(0, 20)),
        min_size=1,
        max_size=10,
    ),
    kv_tokens=st.sampled_from([192, 320, 4096]),
    max_batch_tokens=st.sampled_from([8, 33, 512]),
)
def test_greedy_equals_generate_beside_any_other_requests(
    name: str, jobs: list[tuple[int, int, int, int, int]], kv_tokens: int, max_batch_tokens: int
) -> None:
    """Shared beginnings (prefix hits), small budgets (chunks), small caches (preemption), arrivals at any time."""
    model = MODELS[name]
    limits = EngineLimits(max_sequences=6, max_batch_tokens=max_batch_tokens, kv_tokens=kv_tokens)

    async def main() -> None:
        async def one(group: int, shared: int, own: int, max_tokens: int, delay: int) -> None:
            await asyncio.sleep(delay / 1000)
            ids = prompt(shared, group) + prompt(own, 100 * shared + own)
            assert await tokens(engine, ids, greedy(max_tokens)) == model.greedy(ids, max_tokens)

        with running(model.network, limits) as engine:
            await asyncio.gather(*(one(*job) for job in jobs))
            await settled(engine)
            assert engine.stats().kv_tokens_used == 0

    asyncio.run(main())


def test_a_full_cache_preempts_and_the_answers_stay_the_same() -> None:
    model = MODELS["grouped"]
    prompts = [prompt(40, seed) for seed in range(5)]

    async def main() -> int:
        with running(model.network, EngineLimits(max_sequences=5, max_batch_tokens=64, kv_tokens=352)) as engine:
            answers = await asyncio.gather(*(tokens(engine, ids, greedy(80)) for ids in prompts))
            assert answers == [model.greedy(ids, 80) for ids in prompts]
            return engine.stats().preemptions

    assert asyncio.run(main()) > 0


def test_keys_and_values_in_16_bits_change_no_answer_by_other_requests_or_prefixes() -> None:
    """Rounded keys may give other tokens than exact ones, but the same alone, in a batch and after a prefix hit."""
    limits = EngineLimits(max_sequences=6, max_batch_tokens=64, kv_tokens=2048, kv_dtype=torch.bfloat16)
    prompts = [prompt(length, length) for length in (5, 40, 90)]
    network = MODELS["grouped"].network

    async def main() -> None:
        with running(network, limits) as engine:
            alone = [await tokens(engine, ids, greedy(12)) for ids in prompts]
            again = await asyncio.gather(*(tokens(engine, ids, greedy(12)) for ids in prompts))
        assert again == alone
        with running(network, EngineLimits(kv_tokens=2048)) as engine:
            exact = [await tokens(engine, ids, greedy(12)) for ids in prompts]
        assert [answer[:2] for answer in alone] == [answer[:2] for answer in exact]

    asyncio.run(main())


def test_a_seed_gives_the_same_text_alone_and_beside_other_requests() -> None:
    model = MODELS["grouped"]
    sampling = SamplingParams(max_tokens=40, temperature=1.3, top_p=0.9, seed=7)

    async def main() -> None:
        with running(model.network, EngineLimits(max_sequences=8, kv_tokens=4096)) as engine:
            alone = await tokens(engine, prompt(20, 1), sampling)
            others = [tokens(engine, prompt(30, s), SamplingParams(max_tokens=60, seed=s)) for s in range(2, 7)]
            together, *_ = await asyncio.gather(tokens(engine, prompt(20, 1), sampling), *others)
            assert together == alone
            other_seed = await tokens(engine, prompt(20, 1), SamplingParams(max_tokens=40, temperature=1.3, seed=8))
            assert other_seed != alone

    asyncio.run(main())


def test_a_second_round_reuses_the_first_and_counts_it() -> None:
    model = MODELS["one key head"]
    history = prompt(200, 1)

    async def main() -> None:
        with running(model.network, EngineLimits(kv_tokens=4096)) as engine:
            first = await generate(engine, history, greedy(10))
            assert {output.num_cached_tokens for output in first} == {0}
            longer = [*history, *(output.token_id for output in first[:-1]), *prompt(20, 2)]
            second = await generate(engine, longer, greedy(10))
            assert second[0].num_cached_tokens == len(history) + 9
            assert [output.token_id for output in second] == model.greedy(longer, 10)

    asyncio.run(main())


def test_several_answers_compute_their_prompt_once() -> None:
    model = MODELS["grouped"]

    async def main() -> None:
        with running(model.network, EngineLimits(kv_tokens=4096, max_batch_tokens=64)) as engine:
            ids = prompt(150, 4)
            samplings = [SamplingParams(max_tokens=5, seed=s) for s in range(6)]
            by_choice: dict[int, list[int]] = {}
            async with generating(engine, ids, samplings) as outputs:
                async for choice, output in outputs:
                    by_choice.setdefault(choice, []).append(output.token_id)
            assert {choice: len(answer) for choice, answer in by_choice.items()} == dict.fromkeys(range(6), 5)
            stats = engine.stats()
            assert stats.prompt_tokens - stats.cached_tokens <= 150 + 5 * 16

    asyncio.run(main())


def test_a_stop_token_ends_an_answer_and_is_reported() -> None:
    model = MODELS["grouped"]
    ids = prompt(12, 3)
    expected = model.greedy(ids, 20)
    stop = expected[5]

    async def main() -> None:
        with running(model.network, EngineLimits(kv_tokens=1024)) as engine:
            sampling = SamplingParams(max_tokens=20, temperature=0, stop_token_ids=frozenset([stop]))
            outputs = await generate(engine, ids, sampling)
            assert [output.token_id for output in outputs] == expected[: expected.index(stop) + 1]
            assert [output.finish_reason for output in outputs][-1] == "stop"
            later = SamplingParams(max_tokens=9, temperature=0, stop_token_ids=frozenset([stop]), min_tokens=8)
            longer = await generate(engine, ids, later)
            assert stop not in [output.token_id for output in longer[:8]]

    asyncio.run(main())


@pytest.mark.parametrize("read_first", [0, 3])
def test_leaving_frees_everything(read_first: int) -> None:
    model = MODELS["grouped"]

    async def main() -> None:
        with running(model.network, EngineLimits(kv_tokens=2048)) as engine:
            async with generating(engine, prompt(300, 5), [greedy(1000), greedy(1000)]) as outputs:
                for _ in range(read_first):
                    await anext(outputs)
            await settled(engine)
            assert engine.stats().kv_tokens_used == 0

    asyncio.run(main())


def test_a_request_that_can_never_fit_is_refused_with_numbers() -> None:
    async def main() -> None:
        with (
            running(MODELS["grouped"].network, EngineLimits(kv_tokens=128)) as engine,
            pytest.raises(RequestTooLarge, match="140 tokens of cache, and there are 128"),
        ):
            await tokens(engine, prompt(100, 1), greedy(40))

    asyncio.run(main())


def test_stopping_the_engine_ends_every_request() -> None:
    async def main() -> None:
        with running(MODELS["grouped"].network, EngineLimits(kv_tokens=8192, max_sequences=2)) as engine:
            waiting = [asyncio.create_task(tokens(engine, prompt(5, s), greedy(1500))) for s in range(4)]
            await asyncio.sleep(0.05)
            await asyncio.to_thread(engine.stop)
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(result, EngineStopped) for result in results)
            with pytest.raises(EngineStopped):
                await tokens(engine, prompt(5, 9), greedy(1))

    asyncio.run(main())


def test_logprobs_are_those_of_the_unmodified_distribution() -> None:
    model: TinyModel = MODELS["grouped"]
    ids = prompt(10, 2)

    async def main() -> None:
        with running(model.network, EngineLimits(kv_tokens=1024)) as engine:
            sampling = SamplingParams(max_tokens=1, temperature=0.3, presence_penalty=1.5, seed=1, num_top_logprobs=4)
            (output,) = await generate(engine, ids, sampling)
            with torch.inference_mode():
                expected = model.oracle(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert output.logprob is not None
            assert output.logprob.logprob == pytest.approx(float(expected[output.token_id]), abs=1e-4)
            values, best = expected.topk(4)
            assert [token for token, _ in output.logprob.top] == best.tolist()
            assert [value for _, value in output.logprob.top] == pytest.approx(values.tolist(), abs=1e-4)

    asyncio.run(main())


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(10, 60), st.integers(1, 70), st.integers(0, 9)), min_size=1, max_size=4
    ),
    st.sampled_from([256, 2048]),
)
def test_speculation_never_changes_a_greedy_answer(jobs: list[tuple[int, int, int, int]], kv_tokens: int) -> None:
    """Repetitive prompts lead to drafts; stop tokens, limits and a small cache end them early."""
    model = MODELS["grouped"]

    async def main() -> None:
        async def one(period: int, length: int, max_tokens: int, stop_at: int) -> None:
            ids = (prompt(period, period) * length)[:length]
            expected = model.greedy(ids, max_tokens)
            stop = expected[min(stop_at, len(expected) - 1)]
            wanted = expected[: expected.index(stop) + 1]
            sampling = SamplingParams(max_tokens=max_tokens, temperature=0, stop_token_ids=frozenset([stop]))
            assert await tokens(engine, ids, sampling) == wanted
            assert await tokens(engine, ids, greedy(max_tokens)) == expected

        with running(model.network, EngineLimits(max_sequences=4, max_batch_tokens=64, kv_tokens=kv_tokens)) as engine:
            await asyncio.gather(*(one(*job) for job in jobs))
            await settled(engine)

    asyncio.run(main())


class Counting:
    """A network that counts round and round: after token t comes t + 1, and after the last one the first."""

    shape = NetworkShape(1, 1, 1, 8, hidden_size=10, vocab_size=10, num_tokens=10, max_positions=1024)
    device, dtype = torch.device("cpu"), torch.float32

    def layout(self, prompt_ids: Sequence[int]) -> PromptLayout:
        return CAUSAL

    def forward(self, batch: RaggedBatch, attend: AttentionFunction) -> torch.Tensor:
        heads = torch.zeros(len(batch.token_ids), 1, 8)
        attend(0, heads, heads, heads, 1.0)
        return torch.nn.functional.one_hot((batch.token_ids + 1) % 10, 10).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def test_an_answer_that_repeats_takes_fewer_steps_than_tokens() -> None:
    async def main() -> None:
        with running(Counting(), EngineLimits(kv_tokens=1024)) as engine:
            assert await tokens(engine, [1, 2, 3], greedy(80)) == [(4 + i) % 10 for i in range(80)]
            assert engine.num_steps < 40

    asyncio.run(main())
