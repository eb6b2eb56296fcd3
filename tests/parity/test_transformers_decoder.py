"""Networks of transformers give the tokens of `generate` in the engine, also beyond their attention window."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from models.checkpoints.open_decoder import open_decoder
from models.store.progress import no_progress
from serving.engine.interface import EngineLimits
from tests.tiny import generate, greedy, running, tokens

VOCABULARY, LENGTH, NUM_NEW = 300, 512, 24
WINDOW = 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": LENGTH,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LONG_BASE = {"rope_type": "default", "rope_theta": 10_000.0 * 500, "partial_rotary_factor": 0.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
NETWORKS: dict[str, Callable[[], Any]] = {
    "glm-4": lambda: GlmForCausalLM(GlmConfig(**SIZES, attention_bias=True, rope_parameters=LONG_BASE)),
    "glm-4-0414": lambda: Glm4ForCausalLM(Glm4Config(**SIZES, attention_bias=True, rope_parameters=LONG_BASE)),
    "llama-3.1": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "llama with YaRN": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=YARN)),
    "qwen2 with YaRN": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_parameters=YARN)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)),
    "qwen2 with some windows": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
}


class Both:
    """One random network as a CausalLM, and as a transformers model."""

    def __init__(self, folder: Path, kind: str) -> None:
        torch.manual_seed(5)
        torch.set_num_threads(1)
        model = NETWORKS[kind]()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(1 if "embed" in name or "lm_head" in name else 10)
        model.save_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.network = open_decoder(folder, torch.device("cpu"), "float32", no_progress, VOCABULARY, LENGTH)

    def greedy(self, prompt: Sequence[int]) -> list[int]:
        with torch.inference_mode():
            out = self.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=NUM_NEW,
                do_sample=False,
            )
        answer: list[int] = out[0, len(prompt) :].tolist()
        return answer


@pytest.fixture(scope="module", params=NETWORKS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(tmp_path_factory.mktemp("network"), request.param)


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCABULARY), k=length)


@pytest.mark.parametrize("max_batch_tokens", [24, 512])
def test_the_engine_gives_the_tokens_of_generate_beyond_every_window(both: Both, max_batch_tokens: int) -> None:
    prompts = [prompt(length, length) for length in (5, 3 * WINDOW, 150)]
    expected = [both.greedy(ids) for ids in prompts]
    assert len({tuple(answer) for answer in expected}) == len(prompts)

    async def main() -> None:
        with running(both.network, EngineLimits(max_batch_tokens=max_batch_tokens, kv_tokens=4096)) as engine:
            assert await asyncio.gather(*(tokens(engine, ids, greedy(NUM_NEW)) for ids in prompts)) == expected
            # the cache has the beginning of the second prompt
            longer = [*prompts[2], *expected[2][:-1], *prompt(20, 9)]
            steps = await generate(engine, longer, greedy(NUM_NEW))
            assert steps[0].num_cached_tokens >= len(prompts[2])
            assert [step.token_id for step in steps] == both.greedy(longer)

    asyncio.run(main())


def test_a_window_matters_at_this_length(tmp_path: Path) -> None:
    """Otherwise the test above could pass without a window."""
    windowed = Both(tmp_path, "mistral")
    ids = prompt(3 * WINDOW, 3)
    with torch.inference_mode():
        with_window = windowed.model(torch.tensor([ids])).logits[0, -1]
        windowed.model.config.sliding_window = None
        without_window = windowed.model(torch.tensor([ids])).logits[0, -1]
    assert (with_window - without_window).abs().max() > 0.01
