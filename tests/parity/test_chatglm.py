"""ChatGLM-6B in the engine: its answers do not depend on the other sequences of the batch, the cache or the step.

They are those of the network alone, and on the golden checkpoint those of the original code."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import numpy
import pytest
import torch

from models.checkpoints.chatglm import convert, load_network, read_config
from models.checkpoints.files import read_json
from models.networks.chatglm import ChatGLMNetwork
from models.store.progress import no_progress
from serving.engine.interface import EngineLimits, SamplingParams
from serving.engine.native.engine import NativeEngine
from tests.golden_data import GOLDEN
from tests.original_chatglm import write_checkpoint
from tests.reference_attention import greedy as reference
from tests.tiny import generate, greedy, running, settled, tokens

GOLDEN_CHECKPOINT = GOLDEN / "model" / "glm1-tiny"
GOLDEN_END = 505  # suppressed in the golden runs
LIMITS = {
    "large cache": EngineLimits(kv_tokens=8192),
    "chunks": EngineLimits(max_batch_tokens=16, kv_tokens=8192),
    "two at a time": EngineLimits(max_sequences=2, max_batch_tokens=24, kv_tokens=8192),
    "small cache": EngineLimits(max_sequences=6, max_batch_tokens=64, kv_tokens=384),
}


def opened(source: Path, stored: Path) -> ChatGLMNetwork:
    """An original checkpoint, converted and opened as an import would."""
    torch.set_num_threads(1)
    stored.mkdir()
    config = read_config(read_json(source / "config.json"))
    convert(source, stored, config, 0, no_progress)
    return load_network(stored, config, torch.device("cpu"), "float32", no_progress)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> ChatGLMNetwork:
    folder = tmp_path_factory.mktemp("chatglm")
    (folder / "source").mkdir()
    write_checkpoint(folder / "source")
    return opened(folder / "source", folder / "stored")


def prompt(network: ChatGLMNetwork, length: int, seed: int, num_answer: int = 0) -> list[int]:
    """A context with attention in both directions, [gMASK] and <sop>, and perhaps the beginning of an answer."""
    config, chooser = network.config, random.Random(seed)
    words = [i for i in range(200, config.num_tokens) if i not in (config.gmask_token_id, config.bos_token_id)]
    answer = chooser.choices(words, k=num_answer)
    return [*chooser.choices(words, k=length), config.gmask_token_id, config.bos_token_id, *answer]


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_any_batch_gives_the_tokens_of_the_network_alone(network: ChatGLMNetwork, limits: EngineLimits) -> None:
    prompts = [prompt(network, length, seed, seed % 3 * 9) for seed, length in enumerate((70, 3, 40, 1, 90, 25))]
    expected = reference(network, prompts, 60, frozenset(range(network.shape.num_tokens, network.shape.vocab_size)))
    assert len({tuple(answer) for answer in expected}) == len(prompts)

    async def main() -> None:
        with running(network, limits) as engine:
            assert await asyncio.gather(*(tokens(engine, ids, greedy(60)) for ids in prompts)) == expected
            await settled(engine)
            assert engine.stats().kv_tokens_used == 0

    asyncio.run(main())


def test_a_preempted_answer_is_recomputed_and_continued_with_the_same_tokens(network: ChatGLMNetwork) -> None:
    """Attention goes in both directions within the prompt and is causal within the answer, in one prefill of both."""
    prompts = [prompt(network, 38, seed) for seed in range(5)]
    expected = reference(network, prompts, 80, frozenset(range(network.shape.num_tokens, network.shape.vocab_size)))

    async def main() -> int:
        with running(network, EngineLimits(max_sequences=5, max_batch_tokens=64, kv_tokens=352)) as engine:
            assert await asyncio.gather(*(tokens(engine, ids, greedy(80)) for ids in prompts)) == expected
            return engine.stats().preemptions

    assert asyncio.run(main()) > 0


def test_a_context_is_reused_as_a_whole_or_not_at_all(network: ChatGLMNetwork) -> None:
    """Every token of it depends on every other one, so half of a context cannot be reused."""
    first, other = prompt(network, 60, 1), [*prompt(network, 60, 1)[:50], *prompt(network, 30, 2)]
    continued = [*first, *prompt(network, 0, 3, 8)[2:]]

    async def main() -> None:
        with running(network, LIMITS["large cache"]) as engine:
            for ids, num_cached in ((first, 0), (first, len(first) - 1), (other, 0), (continued, len(first))):
                steps = await generate(engine, ids, greedy(20))
                assert [step.token_id for step in steps] == reference(network, [ids], 20)[0]
                assert steps[0].num_cached_tokens == pytest.approx(num_cached, abs=1)

    asyncio.run(main())


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_the_engine_gives_the_originals_64_tokens(limits: EngineLimits, tmp_path: Path) -> None:
    network = opened(GOLDEN_CHECKPOINT, tmp_path / "stored")
    recorded = numpy.load(GOLDEN_CHECKPOINT / "expected.npz")
    prompts = [recorded[f"ids{k}"][0].tolist() for k in range(5)]
    answers = [recorded[f"greedy64_{k}"].tolist() for k in range(5)]
    sampling = SamplingParams(max_tokens=64, temperature=0.0, logit_bias=((GOLDEN_END, -1e6),))

    async def twice(engine: NativeEngine, ids: list[int]) -> list[list[int]]:
        return [await tokens(engine, ids, sampling), await tokens(engine, ids, sampling)]

    async def main() -> None:
        with running(network, limits) as engine:
            results = await asyncio.gather(*(twice(engine, ids) for ids in prompts))
            assert results == [[answer, answer] for answer in answers]

    asyncio.run(main())
