"""The measurements of benchmarks.gpu: limits of the device, the native engine, and transformers' engines.

Also runs on a CPU with a tiny shape, so that the script is tested before it runs on a GPU machine.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GlmForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.shapes import config, random_model
from kernels import linears
from kernels.precision import Precision
from models.networks.flat_decoder import FlatDecoder
from models.store.progress import no_progress
from serving.engine.interface import CAUSAL, EngineLimits, RaggedBatch, SamplingParams, Span
from serving.engine.native.attention import AttentionSpan
from serving.engine.native.attention_cuda import choose_kernel, step_attention
from serving.engine.native.cuda_graphs import CaptureFunction, CudaCapture, run_eagerly
from serving.engine.native.engine import NativeEngine
from serving.engine.native.kv_memory import KVMemory
from serving.engine.native.sequence import BLOCK
from tests.tiny import generating

IDS = range(1000, 60_000)
Figures = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Device and shape of the measured network."""

    device: torch.device
    shape: str
    max_batch_tokens: int
    max_positions: int = 8192

    @property
    def makes_on(self) -> torch.device:
        """Where random weights are generated: on a GPU with enough memory for them in 32 bits, else on the host."""
        if self.is_cuda and torch.cuda.get_device_properties(self.device).total_memory < 32 * 2**30:
            return torch.device("cpu")
        return self.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def capture(self) -> CaptureFunction:
        return CudaCapture(self.device) if self.is_cuda else run_eagerly

    def clear(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def memory_gb(self) -> Figures:
        """Device memory that torch has allocated now, and the most it has reserved since `clear`."""
        if not self.is_cuda:
            return {}
        held, most = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        return {"held_gb": held / 1e9, "most_reserved_gb": most / 1e9}

    def seconds(self, run: Callable[[], object], rounds: int = 10) -> float:
        """The shortest duration of several rounds."""
        with torch.inference_mode():
            run()
            times: list[float] = []
            for _ in range(rounds):
                self.wait()
                begun = time.perf_counter()
                run()
                self.wait()
                times.append(time.perf_counter() - begun)
        return min(times)


def limits(bench: Bench, megabytes: int, side: int) -> Figures:
    """Bytes per second of a copy (read and written), operations per second of a square product, by type."""
    source = torch.ones(megabytes * 2**20 // 4, device=bench.device)
    target = torch.empty_like(source)
    found: Figures = {"copy_bytes_per_second": 2 * source.nbytes / bench.seconds(partial(target.copy_, source))}
    del source, target
    for dtype in (torch.bfloat16, torch.float16):
        a = torch.randn(side, side, device=bench.device).to(dtype)
        found[f"product_{dtype}_per_second".replace("torch.", "")] = (
            2 * side**3 / bench.seconds(partial(torch.mm, a, a))
        )
    return found


def linear_speeds(bench: Bench, precision: Precision, rows: tuple[int, ...]) -> Figures:
    """Bytes of weights per second in one product of the feed-forward, by number of rows."""
    sizes = config(bench.shape)
    inputs, outputs = sizes.hidden_size, 2 * sizes.intermediate_size
    linear = torch.nn.Linear(inputs, outputs, bias=False, device=bench.device)
    dtype = linears.compute_dtype(precision, bench.device)
    is_packed = not bench.is_cuda or precision in ("int8", "int4")
    module = linears.packed_linear(linear, precision, bench.device) if is_packed else linear.to(dtype)
    per_weight = {"int8": 1.0, "int4": 36 / 64, "float32": 4.0}.get(precision, 2.0)
    found: Figures = {"kernel": type(module).__name__}
    for count in rows:
        x = torch.randn(count, inputs, device=bench.device).to(dtype)
        found[f"bytes_per_second_{count}_rows"] = inputs * outputs * per_weight / bench.seconds(partial(module, x))
    return found


def network(bench: Bench, precision: Precision) -> FlatDecoder:
    """A network with the same random weights in each precision."""
    where = linears.load_device(precision, bench.device)
    model = random_model(bench.shape, torch.bfloat16, device=bench.makes_on).to(where)
    for parameter in model.parameters():  # not the buffers: the rotary frequencies keep their type
        parameter.data = parameter.data.to(linears.storage_dtype(precision, bench.device, torch.bfloat16))
    return FlatDecoder(model, precision, model.config.vocab_size, bench.max_positions, no_progress, bench.device)


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(IDS, k=length)


@torch.inference_mode()
def logits_of(decoder: FlatDecoder, lengths: tuple[int, ...]) -> Tensor:
    """[2 * prompts, vocabulary] float32 on the CPU: after some prompts, and after a further token of each."""
    num_blocks = [-(-(length + 2) // BLOCK) for length in lengths]
    memory = KVMemory(decoder.shape, sum(num_blocks), decoder.device, decoder.dtype)
    numbers = iter(range(sum(num_blocks)))
    tables = [[next(numbers) for _ in range(count)] for count in num_blocks]
    kernel = choose_kernel(decoder.device, decoder.dtype, decoder.shape.head_dim)
    rows = [(prompt(length, seed), 0) for seed, length in enumerate(lengths)]
    found: list[Tensor] = []
    for num_single in (0, len(lengths)):
        spans: list[AttentionSpan] = []
        ids, indices = list[int](), list[int]()
        for (token_ids, begin), table in zip(rows, tables, strict=True):
            end = begin + len(token_ids)
            spans.append(AttentionSpan(len(ids), len(ids) + len(token_ids), table, end, CAUSAL))
            ids += token_ids
            indices += range(begin, end)
        attend = step_attention(memory, spans, num_single, kernel)
        batch = RaggedBatch(
            torch.tensor(ids, device=decoder.device),
            torch.tensor(indices, device=decoder.device),
            tuple(Span(s.first, s.last, CAUSAL) for s in spans),
        )
        hidden = decoder.forward(batch, attend)
        found.append(decoder.logits(hidden[[s.last - 1 for s in spans]]).float().cpu())
        rows = [([5], length) for length in lengths]
    return torch.cat(found)


def relative_error(got: Tensor, expected: Tensor) -> Figures:
    """Relative error over all rows and of the worst row, and how often the most likely token differs."""
    rows = (got - expected).norm(dim=1) / expected.norm(dim=1)
    other = (got.argmax(dim=1) != expected.argmax(dim=1)).float().mean()
    return {
        "relative": float((got - expected).norm() / expected.norm()),
        "worst_row": float(rows.max()),
        "other_token": float(other),
    }


class Serving:
    """The native engine with one network, without HTTP."""

    def __init__(self, bench: Bench, decoder: FlatDecoder, kv_tokens: int, max_sequences: int, graphs: bool) -> None:
        self._bench = bench
        begun = time.perf_counter()
        self.engine = NativeEngine(
            decoder,
            EngineLimits(max_sequences, max(bench.max_batch_tokens, max_sequences + 1), kv_tokens),
            bench.capture() if graphs else None,
        )
        self.engine.start()
        captured = self.engine.graphs
        self.start: Figures = {"seconds_to_ready": time.perf_counter() - begun}
        if captured is not None:
            self.start |= {"recording_seconds": captured.capture_seconds, "graphs": captured.num_captured}

    def close(self) -> None:
        self.engine.stop()

    def load(self, num_prompts: int, prompt_tokens: int, new_tokens: int, seed: int) -> Figures:
        """All prompts at once: tokens per second, and medians of the time to the first token and between two."""
        prompts = [prompt(prompt_tokens, 1000 * seed + i) for i in range(num_prompts)]
        return asyncio.run(self._load(prompts, new_tokens))

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        return asyncio.run(self._tokens(ids, new_tokens))

    async def _tokens(self, ids: list[int], new_tokens: int) -> list[int]:
        async with generating(self.engine, ids, [_plain(new_tokens)]) as outputs:
            return [output.token_id async for _, output in outputs]

    async def _load(self, prompts: list[list[int]], new_tokens: int) -> Figures:
        arrivals: list[list[float]] = []
        cached: list[int] = []

        async def one(ids: list[int]) -> None:
            mine: list[float] = []
            async with generating(self.engine, ids, [_plain(new_tokens)]) as outputs:
                async for _, output in outputs:
                    mine.append(time.perf_counter())
                    cached.append(output.num_cached_tokens)
            arrivals.append(mine)

        begun, steps_before = time.perf_counter(), self.engine.num_steps
        await asyncio.gather(*(one(ids) for ids in prompts))
        seconds = time.perf_counter() - begun
        gaps = [b - a for mine in arrivals for a, b in pairwise(mine)]
        return {
            "tokens_per_second": len(prompts) * new_tokens / seconds,
            "ttft_ms_p50": 1000 * statistics.median(mine[0] - begun for mine in arrivals),
            "gap_ms_p50": 1000 * statistics.median(gaps) if gaps else None,
            "decode_tokens_per_second": len(prompts) / statistics.median(gaps) if gaps else None,
            "steps": self.engine.num_steps - steps_before,
            "cached_tokens": max(cached),
        }


def _plain(new_tokens: int) -> SamplingParams:
    """Greedy; `min_tokens` without a stop token has no effect except that no drafts are made."""
    return SamplingParams(max_tokens=new_tokens, temperature=0.0, min_tokens=1)


def generate_speed(bench: Bench, model: GlmForCausalLM, batch: int, prompt_tokens: int, new_tokens: int) -> Figures:
    """transformers' `generate` with one batch of prompts of equal length: the best case without batching."""
    ids = torch.tensor([prompt(prompt_tokens, seed) for seed in range(batch)], device=bench.device)
    run = partial(
        model.generate,
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return {"tokens_per_second": batch * new_tokens / bench.seconds(run, rounds=2)}


def continuous_batching_speed(
    bench: Bench, model: GlmForCausalLM, batch: int, prompt_tokens: int, new_tokens: int
) -> Figures:
    """transformers' own continuous batching, with its defaults on a GPU."""
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    how = None if bench.is_cuda else ContinuousBatchingConfig(page_size=32, num_blocks=32, max_batch_tokens=64)
    prompts = [prompt(prompt_tokens, seed) for seed in range(batch)]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    times: list[float] = []
    for _ in range(2):  # the first one warms up
        begun = time.perf_counter()
        done = model.generate_batch(prompts, settings, how)
        times.append(time.perf_counter() - begun)
    num_tokens = sum(len(one.generated_tokens) for one in done.values())
    return {"tokens_per_second": num_tokens / times[-1], "attention": model.config._attn_implementation}
