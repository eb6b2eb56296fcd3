"""A text's vector is the mean of transformers' own hidden states, whatever shares the batch, the cache or the step."""

from __future__ import annotations

import asyncio
import random
from contextlib import closing

import pytest
import torch

from serving.engine.interface import EngineLimits
from serving.engine.native.engine import NativeEngine
from serving.engine.output_queue import OutputQueue
from serving.engine.outputs import PoolingOutput, RequestTooLarge
from tests.tiny import VOCABULARY, TinyModel, greedy, outputs_of, running, settled, tiny_model, tokens

MODEL = tiny_model(4)


def text(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCABULARY), k=length)


def mean_of_oracle(model: TinyModel, ids: list[int], counted: range) -> torch.Tensor:
    with torch.inference_mode():
        hidden = model.oracle.base_model(torch.tensor([ids])).last_hidden_state[0]
    return hidden[counted.start : counted.stop].mean(dim=0)


async def embedded(engine: NativeEngine, texts: list[tuple[list[int], range]]) -> list[torch.Tensor]:
    vectors = [torch.empty(0)] * len(texts)
    with closing(OutputQueue[PoolingOutput]()) as queue:
        engine.embed(texts, queue)
        async for index, pooled in outputs_of(queue):
            vectors[index] = torch.tensor(pooled.vector)
    return vectors


@pytest.mark.parametrize("max_batch_tokens", [8, 33, 512])
@pytest.mark.parametrize("kv_tokens", [320, 4096])
def test_the_vector_is_the_mean_of_the_hidden_states_alone_and_in_company(
    max_batch_tokens: int, kv_tokens: int
) -> None:
    """Small budgets make chunks, a small cache preempts; answers are written and prefixes shared meanwhile."""
    shared = text(70, 1)
    texts = [(ids, range(len(ids))) for ids in ([5], text(31, 2), shared, shared, [*shared, *text(90, 3)])]
    texts += [(text(40, 4), range(2, 40)), (text(40, 5), range(0, 37)), (text(40, 6), range(39, 40))]
    limits = EngineLimits(max_sequences=5, max_batch_tokens=max_batch_tokens, kv_tokens=kv_tokens)

    async def main() -> None:
        with running(MODEL.network, limits) as engine:
            answers = [tokens(engine, [*shared, 7], greedy(60)), tokens(engine, shared, greedy(60))]
            vectors, *written = await asyncio.gather(embedded(engine, texts), *answers)
            assert written == [MODEL.greedy([*shared, 7], 60), MODEL.greedy(shared, 60)]
            for vector, (ids, counted) in zip(vectors, texts, strict=True):
                torch.testing.assert_close(vector, mean_of_oracle(MODEL, ids, counted), rtol=0, atol=1e-5)
            await settled(engine)
            assert engine.stats().kv_tokens_used == 0

    asyncio.run(main())


def test_a_text_that_was_preempted_is_summed_again_from_its_beginning() -> None:
    ids = text(160, 8)
    prompts = [text(10, 9), text(10, 10)]

    async def main() -> None:
        with running(MODEL.network, EngineLimits(max_batch_tokens=4, kv_tokens=320)) as engine:
            answers = [asyncio.create_task(tokens(engine, prompt, greedy(120))) for prompt in prompts]
            await asyncio.sleep(0)
            (vector,) = await embedded(engine, [(ids, range(160))])
            assert engine.stats().preemptions > 0
            torch.testing.assert_close(vector, mean_of_oracle(MODEL, ids, range(160)), rtol=0, atol=1e-5)
            assert await asyncio.gather(*answers) == [MODEL.greedy(prompt, 120) for prompt in prompts]

    asyncio.run(main())


def test_a_text_that_was_embedded_is_no_prefix_of_anything() -> None:
    ids = text(100, 7)

    async def main() -> None:
        with running(MODEL.network, EngineLimits(kv_tokens=1024)) as engine:
            await embedded(engine, [(ids, range(100))])
            assert await tokens(engine, ids, greedy(8)) == MODEL.greedy(ids, 8)
            again = await embedded(engine, [(ids, range(100))])
            torch.testing.assert_close(again[0], mean_of_oracle(MODEL, ids, range(100)), rtol=0, atol=1e-5)
            assert engine.stats().cached_tokens == 0

    asyncio.run(main())


def test_leaving_frees_everything_and_too_long_a_text_is_refused() -> None:
    async def main() -> None:
        with running(MODEL.network, EngineLimits(kv_tokens=512, max_batch_tokens=8)) as engine:
            with closing(OutputQueue[PoolingOutput]()) as queue:
                engine.embed([(text(300, s), range(300)) for s in range(4)], queue)
                await asyncio.sleep(0.01)
            await settled(engine)
            assert engine.stats().kv_tokens_used == 0
            with pytest.raises(RequestTooLarge, match="513 tokens of cache, and there are 512"):
                engine.embed([(text(512, 1), range(512))], OutputQueue[PoolingOutput]())

    asyncio.run(main())
