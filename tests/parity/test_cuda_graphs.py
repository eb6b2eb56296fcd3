"""A GPU's step, run on the CPU: buckets, fixed buffers, padding rows, packed attention."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.networks.transformers_decoder import TransformersDecoder
from serving.engine.interface import CAUSAL, EngineLimits, NetworkShape, PromptLayout, SamplingParams
from serving.engine.native.attention import AttentionSpan, StepAttention
from serving.engine.native.attention_cuda import PADDED, Kernel, Packed, step_attention
from serving.engine.native.cuda_graphs import bucket_sizes, run_eagerly
from serving.engine.native.engine import NativeEngine
from serving.engine.native.kv_memory import KVLayer, KVMemory
from serving.engine.native.sequence import BLOCK
from tests.reference_attention import dense_attention, visible
from tests.tiny import VOCABULARY, TinyModel, greedy, settled, tiny_model, tokens

MODEL = tiny_model(1)


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCABULARY), k=length)


class CountingCapture:
    """Runs eagerly and counts captures and replays."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1
        again = run_eagerly(run)

        def replay() -> None:
            self.num_replayed += 1
            again()

        return replay


def answers(
    network: TransformersDecoder,
    limits: EngineLimits,
    jobs: list[tuple[list[int], SamplingParams]],
    capture: object = None,
) -> list[list[int]]:
    async def main() -> list[list[int]]:
        engine = NativeEngine(network, limits, capture)
        engine.start()
        try:
            found = await asyncio.gather(*(tokens(engine, *job) for job in jobs))
            await settled(engine)
            return found
        finally:
            engine.stop()

    return asyncio.run(main())


@settings(max_examples=5, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 25)), min_size=1, max_size=9),
    kv_tokens=st.sampled_from([192, 2048]),
    max_batch_tokens=st.sampled_from([8, 64]),
)
def test_captured_steps_give_what_generate_gives(
    jobs: list[tuple[int, int]], kv_tokens: int, max_batch_tokens: int
) -> None:
    """Chunks between the decode steps, preemption, drafts (several rows of one answer), sizes between the buckets."""
    limits = EngineLimits(max_sequences=6, max_batch_tokens=max_batch_tokens, kv_tokens=kv_tokens)
    capture = CountingCapture()
    prompts = [prompt(length, 7 * length + i) if i % 2 else [5, 6, 7] * length for i, (length, _) in enumerate(jobs)]
    wanted = [(ids[:70], greedy(count)) for ids, (_, count) in zip(prompts, jobs, strict=True)]
    expected = [MODEL.greedy(ids, sampling.max_tokens) for ids, sampling in wanted]
    assert answers(MODEL.network, limits, wanted, capture) == expected
    assert capture.num_captured == len(bucket_sizes(20))
    # short answers may run beside chunks of the other prompts only
    assert capture.num_replayed > 0 or max(count for _, count in jobs) <= len(jobs) + 1


def test_sampling_penalties_and_logprobs_are_the_same_with_and_without_graphs() -> None:
    limits = EngineLimits(max_sequences=8, kv_tokens=4096)
    samplings = [
        SamplingParams(30, temperature=1.2, top_p=0.9, seed=1),
        SamplingParams(30, temperature=0.0, frequency_penalty=0.7, num_top_logprobs=3),
        SamplingParams(
            30, temperature=1.0, seed=3, logit_bias=((9, 4.0),), min_tokens=9, stop_token_ids=frozenset([9])
        ),
    ]
    jobs = [(prompt(20 + i, i), sampling) for i, sampling in enumerate(samplings)]
    assert answers(MODEL.network, limits, jobs, run_eagerly) == answers(MODEL.network, limits, jobs)


def test_where_capturing_fails_steps_run_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    ids = prompt(20, 1)
    assert answers(MODEL.network, EngineLimits(kv_tokens=1024), [(ids, greedy(12))], refuse) == [MODEL.greedy(ids, 12)]
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "decode steps cannot be captured as graphs; they run eagerly"
    ]


def test_buckets_are_powers_of_two_up_to_the_largest() -> None:
    assert list(bucket_sizes(1)) == [1]
    assert list(bucket_sizes(20)) == [1, 2, 4, 8, 16, 32]
    assert bucket_sizes(5000)[-1] == 256


def _packed_reference(
    query: torch.Tensor, layer: KVLayer, packed: Packed, scale: float, window: int | None
) -> torch.Tensor:
    """What a kernel for chunks has to do, sequence by sequence."""
    assert int(packed.lengths.max()) <= packed.max_length
    outs: list[torch.Tensor] = []
    offsets = packed.offsets.tolist()
    for number, (first, last, length) in enumerate(zip(offsets, offsets[1:], packed.lengths.tolist(), strict=False)):
        assert last - first <= packed.max_rows
        blocks = packed.tables[number, : -(-length // BLOCK)].long()
        past = (
            layer.keys[blocks].permute(0, 3, 1, 2).flatten(0, 1)[:length],
            layer.values[blocks].transpose(1, 2).flatten(0, 1)[:length],
        )
        allowed = visible(length, last - first, CAUSAL, window)
        outs.append(dense_attention(query[first:last], *past, allowed, scale))
    return torch.cat(outs)


@pytest.mark.parametrize("takes_chunks", [False, True])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("num_two_way", [0, 12])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_packed_attention_is_attention_sequence_by_sequence(
    takes_chunks: bool, window: int | None, num_two_way: int, kept: torch.dtype
) -> None:
    shape = NetworkShape(1, 8, 2, 16, 128, 10, 10, 64)
    spans = (  # two answers, one with three draft tokens; a beginning (perhaps two-way), a chunk in the middle
        AttentionSpan(0, 1, [6, 3], 30, CAUSAL),
        AttentionSpan(1, 5, [2], 9, CAUSAL),
        AttentionSpan(5, 20, [5], 15, PromptLayout(num_two_way, 0)),
        AttentionSpan(20, 24, [0, 4], 20, CAUSAL),
    )
    torch.manual_seed(0)
    query, key, value = torch.randn(24, 8, 16), torch.randn(24, 2, 16), torch.randn(24, 2, 16)
    memories = [KVMemory(shape, 8, torch.device("cpu"), kept) for _ in range(3)]
    for memory in memories:
        torch.manual_seed(1)
        memory.keys.normal_()
        memory.values.normal_()
    expected = StepAttention(memories[0], spans, is_native=False)(0, query, key, value, 0.25, window)
    kernel = Kernel(_packed_reference, KVMemory.store, True) if takes_chunks else PADDED
    got = step_attention(memories[1], spans, 2, kernel)(0, query, key, value, 0.25, window)
    native = StepAttention(memories[2], spans)(0, query, key, value, 0.25, window)
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected, atol=1e-5 if kept == torch.float32 else 3e-2)
    assert torch.allclose(native, expected, atol=1e-5 if kept == torch.float32 else 3e-2)
    for memory in memories[1:]:
        assert torch.equal(memories[0].keys, memory.keys)
        assert torch.equal(memories[0].values, memory.values)


def test_a_model_that_is_not_causal_is_not_captured() -> None:
    class TwoWay:
        """MODEL with bidirectional prompts."""

        def __init__(self, inner: TinyModel) -> None:
            self.inner = inner.network
            self.shape, self.device, self.dtype = self.inner.shape, self.inner.device, self.inner.dtype
            self.forward, self.logits = self.inner.forward, self.inner.logits

        def layout(self, prompt_ids: list[int]) -> PromptLayout:
            return PromptLayout(num_two_way=len(prompt_ids))

    capture = CountingCapture()
    ids = prompt(20, 1)
    jobs = [(ids, greedy(8))]
    network = TwoWay(MODEL)
    assert answers(network, EngineLimits(kv_tokens=512), jobs, capture) == answers(
        network, EngineLimits(kv_tokens=512), jobs
    )
    assert capture.num_captured == 0
