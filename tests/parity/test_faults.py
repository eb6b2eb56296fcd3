"""A fault fails its own requests only, and no request waits for ever: faults injected into a real engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
import torch

from serving.engine.interface import EngineLimits, PromptLayout, SamplingParams
from serving.engine.native.engine import NativeEngine
from serving.engine.output_queue import MAX_UNREAD, OutputQueue
from serving.engine.outputs import EngineStopped, OutOfMemory, PoolingOutput, RequestFailed, UnknownToken
from tests.contract.tiny import HookedNetwork
from tests.tiny import VOCABULARY, generate, generating, greedy, running, settled, tiny_model, tokens

PROMPT = [7, 8, 9, 10, 11]
OTHER = [30, 31, 32]


@contextmanager
def hooked_engine(before: Callable[[], None], kv_tokens: int = 4096) -> Iterator[NativeEngine]:
    torch.set_num_threads(1)
    with running(HookedNetwork(tiny_model().network, before), EngineLimits(kv_tokens=kv_tokens)) as engine:
        yield engine


class MisleadingLayout(HookedNetwork):
    """Says something about a prompt that the scheduler cannot count with."""

    def layout(self, prompt_ids: Sequence[int]) -> PromptLayout:
        return PromptLayout(num_two_way=None)  # type: ignore[arg-type]


class Failing:
    """Raises in the forwards whose numbers are given, the first being 1."""

    def __init__(self, numbers: set[int], error: Callable[[], Exception]) -> None:
        self.numbers, self.error, self.count = numbers, error, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count in self.numbers:
            raise self.error()


def test_a_failed_forward_ends_its_request_and_the_next_one_is_answered_rightly() -> None:
    async def run() -> None:
        with hooked_engine(Failing({3}, lambda: RuntimeError("injected"))) as engine:
            with pytest.raises(RequestFailed):
                await tokens(engine, PROMPT, greedy(8))
            assert await tokens(engine, PROMPT, greedy(8)) == tiny_model().greedy(PROMPT, 8)
            await settled(engine)
            assert engine.stats().kv_tokens_used == 0
            assert engine.is_alive

    asyncio.run(run())


def test_a_step_that_fails_once_fails_no_request() -> None:
    """Whatever it was, each part of the batch is computed again, with the slots that the first attempt wrote."""

    async def run() -> None:
        with hooked_engine(Failing({5, 9}, lambda: RuntimeError("injected"))) as engine:
            answers = await asyncio.gather(*(tokens(engine, [*PROMPT, i], greedy(12)) for i in range(5)))
            assert answers == [tiny_model().greedy([*PROMPT, i], 12) for i in range(5)]
            await settled(engine)

    asyncio.run(run())


def test_a_device_that_fails_for_everything_ends_the_engine_but_not_at_once() -> None:
    """Each failing step is two forwards: of the request, and of a token of the engine's own."""

    async def run() -> None:
        with hooked_engine(Failing({1, 2, 3, 4, *range(6, 12)}, lambda: RuntimeError("injected"))) as engine:
            for _ in range(2):
                with pytest.raises(RequestFailed):
                    await tokens(engine, PROMPT, greedy(4))
            assert await tokens(engine, OTHER, greedy(1)) == tiny_model().greedy(OTHER, 1)
            for _ in range(3):
                with pytest.raises(RequestFailed):
                    await tokens(engine, PROMPT, greedy(4))
            await settled(engine)
            while engine.is_alive:
                await asyncio.sleep(0.01)
            with pytest.raises(EngineStopped):
                await tokens(engine, PROMPT, greedy(4))

    asyncio.run(run())


def test_requests_that_fail_one_after_the_other_do_not_end_the_engine() -> None:
    async def run() -> None:
        with hooked_engine(Failing(set(range(1, 21, 2)), lambda: RuntimeError("injected"))) as engine:
            for _ in range(10):
                with pytest.raises(RequestFailed):
                    await tokens(engine, PROMPT, greedy(4))
            assert await tokens(engine, PROMPT, greedy(4)) == tiny_model().greedy(PROMPT, 4)

    asyncio.run(run())


def test_an_id_that_the_network_does_not_have_is_refused_before_the_batch() -> None:
    async def run() -> None:
        with hooked_engine(lambda: None) as engine:
            for token_id in (VOCABULARY, -1):
                with pytest.raises(UnknownToken):
                    await tokens(engine, [7, token_id], greedy(4))
                with closing(OutputQueue[PoolingOutput]()) as queue, pytest.raises(UnknownToken):
                    engine.embed([([7, 8], range(2)), ([7, token_id], range(2))], queue)
            assert not engine.is_busy

    asyncio.run(run())


def test_copies_that_fail_let_the_sequences_that_need_them_start_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy_, failed = torch.Tensor.copy_, list[int]()

    def failing(tensor: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        if threading.current_thread().name == "engine" and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("injected")
        return copy_(tensor, *arguments, **options)  # type: ignore[arg-type]

    async def run() -> None:
        with hooked_engine(lambda: None, kv_tokens=1024) as engine:
            await tokens(engine, PROMPT, greedy(40))
            monkeypatch.setattr(torch.Tensor, "copy_", failing)
            prompts = [[*PROMPT[:-1], i] for i in range(3)]
            answers = await asyncio.gather(*(tokens(engine, ids, greedy(20)) for ids in prompts))
            monkeypatch.undo()
            assert answers == [tiny_model().greedy(ids, 20) for ids in prompts]
            assert caplog.text.count("keys and values could not be copied") == len(failed) == 1

    asyncio.run(run())


def test_out_of_memory_is_reported_as_such_and_the_engine_continues() -> None:
    async def run() -> None:
        with hooked_engine(Failing({2}, lambda: torch.OutOfMemoryError("injected"))) as engine:
            with pytest.raises(OutOfMemory):
                await tokens(engine, PROMPT, greedy(8))
            assert await tokens(engine, PROMPT, greedy(8)) == tiny_model().greedy(PROMPT, 8)

    asyncio.run(run())


def test_a_request_whose_sampling_raises_fails_alone() -> None:
    """A bias on a token that the network does not have raises inside the sampler, in a batch with a healthy request."""

    async def run() -> None:
        with hooked_engine(lambda: None) as engine:
            sick = replace(greedy(12), logit_bias=((VOCABULARY + 5, 1.0),))
            healthy = asyncio.create_task(tokens(engine, PROMPT, greedy(24)))
            with pytest.raises(RequestFailed, match="sampler"):
                await tokens(engine, OTHER, sick)
            assert await healthy == tiny_model().greedy(PROMPT, 24)
            assert engine.is_alive
            await settled(engine)

    asyncio.run(run())


def test_a_prompt_whose_layout_raises_fails_alone() -> None:
    async def run() -> None:
        with hooked_engine(lambda: None) as engine:
            with pytest.raises(TypeError):
                await tokens(engine, None, greedy(4))  # type: ignore[arg-type]
            assert await tokens(engine, PROMPT, greedy(4)) == tiny_model().greedy(PROMPT, 4)

    asyncio.run(run())


def test_a_reader_that_stops_reading_is_paused_and_delays_no_other_request() -> None:
    length = 3 * MAX_UNREAD

    async def run() -> None:
        with hooked_engine(lambda: None) as engine:
            async with generating(engine, PROMPT, [greedy(length)]) as outputs:
                first = await anext(outputs)
                before = -1
                while engine.num_steps != before or engine.is_busy:
                    before = engine.num_steps
                    await asyncio.sleep(0.3)
                assert engine.stats().generated_tokens <= MAX_UNREAD + 60  # what was under way when it was paused
                assert await tokens(engine, OTHER, greedy(5)) == tiny_model().greedy(OTHER, 5)
                got = [first, *[item async for item in outputs]]
            assert [output.token_id for _, output in got] == tiny_model().greedy(PROMPT, length)
            await settled(engine)

    asyncio.run(run())


def test_a_paused_reader_that_leaves_frees_its_slots() -> None:
    async def run() -> None:
        with hooked_engine(lambda: None) as engine:
            async with generating(engine, PROMPT, [greedy(3 * MAX_UNREAD)]) as outputs:
                await anext(outputs)
                while engine.stats().generated_tokens < MAX_UNREAD:
                    await asyncio.sleep(0.05)
            await settled(engine)
            assert engine.stats().kv_tokens_used == 0

    asyncio.run(run())


def test_requests_in_a_hanging_step_fail_and_the_engine_may_continue() -> None:
    released = threading.Event()

    async def run() -> None:
        with hooked_engine(released.wait) as engine:
            try:
                waiting = asyncio.create_task(tokens(engine, PROMPT, greedy(4)))
                while not engine.is_busy:
                    await asyncio.sleep(0.01)
                engine.give_up()
                with pytest.raises(EngineStopped):
                    await asyncio.wait_for(waiting, 5)
            finally:
                released.set()
            assert await tokens(engine, PROMPT, greedy(4)) == tiny_model().greedy(PROMPT, 4)
            await settled(engine)

    asyncio.run(run())


def test_a_broken_scheduler_ends_the_engine_and_its_requests() -> None:
    async def run() -> None:
        with running(MisleadingLayout(tiny_model().network, lambda: None), EngineLimits(kv_tokens=4096)) as engine:
            with pytest.raises(EngineStopped):
                await asyncio.wait_for(generate(engine, PROMPT, SamplingParams(4)), 5)
            assert not engine.is_alive

    asyncio.run(run())
