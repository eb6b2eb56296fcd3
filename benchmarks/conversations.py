"""Conversations of several rounds on the native engine without HTTP, with an empty and with a full KV cache.

    python -m benchmarks.conversations --shape quarter --precision int8

All conversations run at once; each next round begins with everything before it. The same load is measured on an empty
cache and on one that finished prompts of others fill, in turns (A B A B): tokens per second, the 99th percentile of a
step with answers relative to the median, and the reused part of the prompts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.engine import opened
from benchmarks.shapes import SHAPES
from models.networks.flat_decoder import FlatDecoder
from serving.engine.interface import SamplingParams
from serving.engine.native.device import keep_freed_memory, kv_dtype, num_usable_cores
from serving.engine.native.model_runner import ModelRunner
from serving.engine.native.scheduler import Scheduler
from serving.engine.native.sequence import BLOCK, SequenceState

IDS = range(1000, 60_000)


class Cache:
    """A scheduler and a runner over one cache."""

    def __init__(self, network: FlatDecoder, num_tokens: int, dtype: torch.dtype) -> None:
        self.scheduler = Scheduler(64, 512, num_tokens)
        self._runner = ModelRunner(network, num_tokens, kv_dtype=dtype)
        self._rng = random.Random(1)

    def run(self, sequences: list[SequenceState]) -> list[float]:
        """Compute them to the end. Returns the seconds of each step that had answers."""
        scheduler, seconds = self.scheduler, list[float]()
        for sequence in sequences:
            scheduler.add(sequence)
        while scheduler.has_work():
            begun = time.perf_counter()
            step = scheduler.schedule()
            self._runner.copy(step.copies)
            results = self._runner.run(step)
            for each in step.scheduled:
                scheduler.computed(each)
            for each, sampled in results:
                if each.sequence.append(sampled[0].token_id):
                    scheduler.finish(each.sequence)
                    self._runner.forget(each.sequence)
            took = time.perf_counter() - begun
            scheduler.pacer.observe(len(step.decoding), step.num_prompt_rows, took)
            if step.decoding:
                seconds.append(took)
        return seconds

    def fill(self) -> None:
        """With finished prompts, until every block holds a known prefix."""
        while self.scheduler.blocks.num_cached < self.scheduler.blocks.num_blocks - 64:
            self.run([sequence(self._rng.choices(IDS, k=480), 1) for _ in range(16)])


def sequence(token_ids: list[int], num_new: int) -> SequenceState:
    """Greedy, but without guesses."""
    return SequenceState(token_ids, SamplingParams(max_tokens=num_new, temperature=1.0, top_k=1), seed=0)


def measure(cache: Cache, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """One load of all conversations."""
    rng = random.Random(seed)
    histories: list[list[int]] = [[] for _ in range(arguments.conversations)]
    seconds, begun = list[float](), time.perf_counter()
    before = cache.scheduler.counters.cached_tokens, cache.scheduler.counters.prompt_tokens
    for _ in range(arguments.rounds):
        round_ = [sequence(history + rng.choices(IDS, k=arguments.prompt), arguments.answer) for history in histories]
        seconds += cache.run(round_)
        histories = [each.token_ids for each in round_]
    total = time.perf_counter() - begun
    counters = cache.scheduler.counters
    return {
        "tokens_per_second": arguments.conversations * arguments.rounds * arguments.answer / total,
        "p99_over_median": sorted(seconds)[int(0.99 * len(seconds))] / statistics.median(seconds),
        "reused": (counters.cached_tokens - before[0]) / (counters.prompt_tokens - before[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="quarter")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--kv-precision", default="auto", choices=("auto", "16", "8"))
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=60, help="new tokens of a round")
    parser.add_argument("--answer", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=2)
    arguments = parser.parse_args()
    arguments.folder, arguments.layers = None, None
    torch.set_num_threads(num_usable_cores())
    keep_freed_memory()
    network, _ = opened(arguments, arguments.precision)
    dtype = kv_dtype(network.device, arguments.precision, network.dtype, arguments.kv_precision)
    per_conversation = arguments.rounds * (arguments.prompt + arguments.answer) + 2 * BLOCK
    num_tokens = arguments.conversations * per_conversation * 5 // 4
    found: dict[str, list[dict[str, float]]] = {"empty": [], "full": []}
    for seed in range(arguments.repeat):
        for name, results in found.items():
            cache = Cache(network, num_tokens, dtype)
            cache.run([sequence(random.Random(seed).choices(IDS, k=100), 4)])
            if name == "full":
                cache.fill()
            results.append(measure(cache, arguments, seed))
            print(name, json.dumps(results[-1]), flush=True)
    medians: dict[str, Any] = {
        name: {key: statistics.median(one[key] for one in results) for key in results[0]}
        for name, results in found.items()
    }
    ratio = medians["full"]["tokens_per_second"] / medians["empty"]["tokens_per_second"]
    head = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "cache_tokens": num_tokens}
    print(json.dumps(head | vars(arguments) | medians | {"full_over_empty": ratio}))


if __name__ == "__main__":
    main()
