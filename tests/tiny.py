"""Tiny random networks in ChatGLM2's shape, and the tokens that transformers' own `generate` gives for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import GlmConfig, GlmForCausalLM

from models.networks.transformers_decoder import TransformersDecoder
from serving.engine.interface import CausalLM, EngineLimits, SamplingParams, TokenMask
from serving.engine.native.engine import NativeEngine
from serving.engine.output_queue import OutputQueue
from serving.engine.outputs import PoolingOutput, TokenOutput

VOCABULARY = 300
OutputT = TypeVar("OutputT", TokenOutput, PoolingOutput)


@dataclass(frozen=True)
class TinyModel:
    """The same weights twice: as a network of the engine's, and as transformers made them."""

    network: TransformersDecoder
    oracle: GlmForCausalLM

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The tokens of `model.generate`, end tokens ignored."""
        with torch.inference_mode():
            out = self.oracle.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        answer: list[int] = out[0, len(prompt) :].tolist()
        return answer


def tiny_model(seed: int = 0, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, layers: int = 2) -> TinyModel:
    torch.manual_seed(seed)
    config = GlmConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        attention_bias=True,
        max_position_embeddings=2048,
        eos_token_id=None,
        pad_token_id=0,
    )
    models = []
    for _ in range(2):
        torch.manual_seed(seed)
        model = GlmForCausalLM(deepcopy(config)).eval()  # each changes its own attention
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(8)  # far apart logits: greedy choices that rounding cannot turn
        models.append(model)
    models[1].set_attn_implementation("sdpa")
    return TinyModel(TransformersDecoder(models[0], VOCABULARY, 2048), models[1])


@contextmanager
def running(network: CausalLM, limits: EngineLimits) -> Iterator[NativeEngine]:
    engine = NativeEngine(network, limits)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


async def outputs_of(queue: OutputQueue[OutputT]) -> AsyncGenerator[tuple[int, OutputT], None]:
    """One by one, to the end."""
    while (outputs := await queue.take()) is not None:
        for item in outputs:
            yield item


@asynccontextmanager
async def generating(
    engine: NativeEngine,
    prompt: Sequence[int],
    samplings: Sequence[SamplingParams],
    masks: Sequence[TokenMask] | None = None,
) -> AsyncIterator[AsyncGenerator[tuple[int, TokenOutput], None]]:
    """(choice, output) of each answer; leaving cancels what still runs."""
    with closing(OutputQueue[TokenOutput]()) as queue:
        engine.generate(prompt, samplings, queue, masks=masks)
        async with aclosing(outputs_of(queue)) as outputs:
            yield outputs


async def generate(engine: NativeEngine, prompt: Sequence[int], sampling: SamplingParams) -> list[TokenOutput]:
    async with generating(engine, prompt, [sampling]) as outputs:
        return [output async for _, output in outputs]


async def tokens(engine: NativeEngine, prompt: Sequence[int], sampling: SamplingParams) -> list[int]:
    return [output.token_id for output in await generate(engine, prompt, sampling)]


async def settled(engine: NativeEngine, seconds: float = 10.0) -> None:
    """Wait until nothing runs and nothing waits; fail if that does not happen."""
    async with asyncio.timeout(seconds):
        while engine.stats().num_running or engine.stats().num_waiting:
            await asyncio.sleep(0.005)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0)
