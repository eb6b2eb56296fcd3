"""P-Tuning v2 prefixes answer as the original code did: logits, greedy tokens, in any batch."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.checkpoints import chatglm, chatglm2
from models.checkpoints.chatglm_tensors import quantization_bits
from models.checkpoints.files import read_json
from models.checkpoints.inspection import inspect
from models.checkpoints.open_decoder import open_decoder
from models.checkpoints.ptuning import CacheShape, import_prefix, load_prefix
from models.family import ImportRefused
from models.store.progress import no_progress
from serving.engine.interface import CausalLM, EngineLimits, RaggedBatch, SamplingParams, Span, TrainedPrefix
from serving.engine.native.attention import AttentionSpan, StepAttention
from serving.engine.native.block_manager import num_blocks_for
from serving.engine.native.cuda_graphs import run_eagerly
from serving.engine.native.engine import NativeEngine
from serving.engine.native.kv_memory import KVMemory
from serving.engine.native.sequence import BLOCK, SequenceState
from serving.engine.output_queue import OutputQueue
from serving.engine.outputs import PoolingOutput
from tests.golden_data import GOLDEN
from tests.tiny import generating

FINETUNE = GOLDEN / "finetune"
CPU = torch.device("cpu")
TOLERANCE = 2e-5
CASES = {  # the data: (the checkpoint to import, the prefix's folder or None if it is in the checkpoint)
    "glm2-ptuning": ("finetune/glm2-base", "checkpoint-3000"),
    "glm2-ptuning-projection": ("finetune/glm2-base", "checkpoint-500"),
    "glm2-int4-ptuning": ("model/glm2-int4", "checkpoint-3000"),
    "glm2-ptuning-projection-full": ("finetune/glm2-ptuning-projection-full", None),
    "glm2-ptuning-full-mixed-dtypes": ("finetune/glm2-ptuning-full-mixed-dtypes", None),
    "glm3-ptuning-projection-full": ("finetune/glm3-ptuning-projection-full", None),
    "glm1-ptuning": ("finetune/glm1-base", "checkpoint-3000"),
    "glm1-ptuning-projection": ("finetune/glm1-base", "checkpoint-500"),
    "glm1-ptuning-projection-full": ("finetune/glm1-ptuning-projection-full", None),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:  # pyright: ignore[reportUnusedFunction]
    torch.set_num_threads(1)


def imported(name: str, target: Path) -> tuple[CausalLM, TrainedPrefix]:
    """The network and its prefix, through the stored folder."""
    base, inner = CASES[name]
    source = GOLDEN / base
    chosen = None if inner is None else str(FINETUNE / name / inner)
    original = read_json(source / "config.json")
    if name.startswith("glm1"):
        config = chatglm.read_config(original)
        chatglm.convert(source, target, config, quantization_bits(original), no_progress)
        shape = CacheShape(config.num_layers, config.num_heads, config.hidden_size // config.num_heads)
        network: CausalLM = chatglm.load_network(target, config, CPU, "float32", no_progress)
    else:
        parsed = chatglm2.read_config(original)
        chatglm2.convert(source, target, "linear", no_progress)
        shape = CacheShape(parsed.num_layers, parsed.num_kv_heads, parsed.head_dim)
        network = open_decoder(target, CPU, "float32", no_progress, 1 << 30, parsed.max_positions)
    import_prefix(source, chosen, target, shape, network.shape.max_positions)
    prefix = load_prefix(target)
    assert prefix is not None
    return network, prefix


@torch.inference_mode()
def logits_of(network: CausalLM, prefix: TrainedPrefix, ids: list[int], is_native: bool) -> torch.Tensor:
    """[tokens, vocabulary] of one prompt in one step."""
    total = prefix.num_tokens + len(ids)
    blocks = list(range(num_blocks_for(total)))
    memory = KVMemory(network.shape, len(blocks), CPU, torch.float32)
    places = torch.arange(prefix.num_tokens)
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        memory.store(layer, places // BLOCK, places % BLOCK, keys, values)
    layout = network.layout(ids)
    span = AttentionSpan(0, len(ids), blocks, total, layout, prefix.num_tokens)
    batch = RaggedBatch(torch.tensor(ids), torch.arange(len(ids)), (Span(0, len(ids), layout),))
    return network.logits(network.forward(batch, StepAttention(memory, (span,), is_native=is_native)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_native", [True, False])
def test_the_logits_are_the_originals(name: str, is_native: bool, tmp_path: Path) -> None:
    network, prefix = imported(name, tmp_path)
    expected: Any = np.load(FINETUNE / name / "expected.npz")
    for key in [key for key in expected if key.startswith("ids")]:
        number = key.removeprefix("ids")
        logits = logits_of(network, prefix, expected[key][0].tolist(), is_native)
        whole = f"logits{number}" in expected
        wanted = expected[f"logits{number}"] if whole else expected[f"logits{number}_last8"]
        got = logits if whole else logits[-8:]
        width = wanted.shape[-1]
        np.testing.assert_allclose(got[:, :width], wanted.reshape(len(got), width), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("batch_tokens", "kv_tokens", "captured"), [(512, 4096, False), (7, 320, False), (64, 640, True)]
)
def test_the_engine_gives_the_originals_tokens(
    name: str, batch_tokens: int, kv_tokens: int, captured: bool, tmp_path: Path
) -> None:
    """All prompts at once and twice, so that prefixes are reused; with small chunks, and with a cache that is too small
    for all, so that answers are preempted."""
    network, prefix = imported(name, tmp_path)
    expected: Any = np.load(FINETUNE / name / "expected.npz")
    numbers = [key.removeprefix("ids") for key in expected if key.startswith("ids")]
    prompts = [expected[f"ids{number}"][0].tolist() for number in numbers]
    longest = max(map(len, prompts)) + 24 + prefix.num_tokens
    limits = EngineLimits(4, batch_tokens, max(kv_tokens, longest + 2 * BLOCK))
    engine = NativeEngine(network, limits, run_eagerly if captured else None, prefix)

    async def answer(ids: list[int]) -> tuple[list[int], int]:
        sampling = SamplingParams(max_tokens=24, temperature=0.0)
        async with generating(engine, ids, [sampling]) as outputs:
            found = [output async for _, output in outputs]
        return [output.token_id for output in found], found[0].num_cached_tokens

    async def run() -> list[list[tuple[list[int], int]]]:
        return [await asyncio.gather(*map(answer, prompts)) for _ in range(2)]

    engine.start()
    try:
        rounds = asyncio.run(run())
    finally:
        engine.stop()
    for answers in rounds:
        for number, ids, (tokens, cached) in zip(numbers, prompts, answers, strict=True):
            assert tokens == expected[f"greedy24_{number}"].flatten().tolist(), number
            assert 0 <= cached < len(ids)
    stats = engine.stats()
    assert stats.prompt_tokens >= 2 * sum(map(len, prompts)) - 1
    assert stats.kv_tokens_used == num_blocks_for(prefix.num_tokens) * BLOCK


def test_embeddings_penalties_and_drafts_do_not_see_the_placeholders(tmp_path: Path) -> None:
    network, prefix = imported("glm2-ptuning", tmp_path)
    ids = [5, 6, 7, 8] * 6

    async def run(engine: NativeEngine) -> list[float]:
        plain = SamplingParams(max_tokens=12, temperature=0.0)
        for sampling in (plain, replace(plain, repetition_penalty=1.3, frequency_penalty=0.5), replace(plain, top_k=1)):
            async with generating(engine, ids, [sampling, sampling]) as outputs:
                assert len([None async for _ in outputs]) == 24
        queue = OutputQueue[PoolingOutput]()
        engine.embed([(ids, range(2, len(ids)))], queue)
        (taken,) = await queue.take() or ()
        return list(taken[1].vector)

    vectors = list[list[float]]()
    for batch_tokens in (64, 7):
        engine = NativeEngine(network, EngineLimits(4, batch_tokens, 2048), None, prefix)
        engine.start()
        try:
            vectors.append(asyncio.run(run(engine)))
        finally:
            engine.stop()
    np.testing.assert_allclose(vectors[0], vectors[1], rtol=1e-4, atol=1e-5)
    assert "4711" not in repr(SequenceState([4711] * 40, SamplingParams(max_tokens=1)))


def test_prefixes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    shape = CacheShape(2, 2, 16)
    good = FINETUNE / "glm2-ptuning" / "checkpoint-3000"
    with pytest.raises(ImportRefused, match=r"numbers a token.*another model"):
        import_prefix(good, None, tmp_path, replace(shape, num_layers=5), 100)
    with pytest.raises(ImportRefused, match="no tensors of a prefix encoder"):
        import_prefix(good, str(FINETUNE / "glm2-base"), tmp_path, shape, 100)
    with pytest.raises(ImportRefused, match="not a folder"):
        import_prefix(good, str(tmp_path / "none"), tmp_path, shape, 100)
    broken = tmp_path / "broken"
    shutil.copytree(FINETUNE / "glm2-ptuning-projection" / "checkpoint-500", broken)
    tensors = torch.load(broken / "pytorch_model.bin", weights_only=True)
    torch.save({k: v for k, v in tensors.items() if "trans.2.bias" not in k}, broken / "pytorch_model.bin")
    with pytest.raises(ImportRefused, match=r"lacks trans\.2\.bias"):
        import_prefix(broken, None, tmp_path, shape, 100)
    assert import_prefix(FINETUNE / "glm2-base", None, tmp_path, shape, 100) == {}
    assert "--prefix" in str(inspect(good))
