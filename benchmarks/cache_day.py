"""A day of requests through the scheduler and the block manager, without a model: leaks, copies, hits, time per step.

    python -m benchmarks.cache_day --requests 100000 --blocks 4096

Conversations of one to many rounds with system prompts of different popularity; the lengths of questions and answers
are log-normal, so that a few are very long. A round begins where the last one ended, after a while. Beside the hits the
hits of an ideal least-recently-used cache are counted: one that holds as many blocks, all of them for finished
requests, and computes a request the moment it arrives.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from serving.engine.interface import SamplingParams
from serving.engine.native.scheduler import Scheduler
from serving.engine.native.sequence import BLOCK, SequenceState

MAX_TOKENS = 8192
SYSTEM_PROMPTS = 200


@dataclass
class IdealCache:
    """Blocks of prompts and answers by their tokens from the beginning, the least recently used one evicted."""

    num_blocks: int
    hits: int = 0
    tokens: int = 0
    _blocks: OrderedDict[Hashable, None] = field(default_factory=OrderedDict[Hashable, None])

    def use(self, token_ids: list[int], num_prompt_tokens: int) -> None:
        """Count what of the prompt is there; then all of it is."""
        parent: Hashable = 0
        keys: list[Hashable] = []
        for first in range(0, len(token_ids) - BLOCK + 1, BLOCK):
            parent = hash((parent, tuple(token_ids[first : first + BLOCK])))
            keys.append(parent)
        prompt_keys = keys[: (num_prompt_tokens - 1) // BLOCK]
        found = next((i for i, key in enumerate(prompt_keys) if key not in self._blocks), len(prompt_keys))
        self.hits += found * BLOCK
        self.tokens += num_prompt_tokens
        for key in reversed(keys):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self.num_blocks:
            self._blocks.popitem(last=False)


class Day:
    """Requests as they arrive: a new conversation, or the next round of one whose reader has thought."""

    def __init__(self, num_requests: int, seed: int) -> None:
        self._rng = random.Random(seed)
        self._left = num_requests
        self._clock = 0
        self._thinking: list[tuple[int, int, list[int]]] = []  # (when, unique, tokens so far)
        self._systems = [self._tokens(self._length(200, 1.0)) for _ in range(SYSTEM_PROMPTS)]

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(60_000) for _ in range(count)]

    def _length(self, median: int, sigma: float) -> int:
        return max(1, min(4000, int(median * self._rng.lognormvariate(0, sigma))))

    def next(self) -> SequenceState | None:
        """None at the end of the day."""
        if not self._left:
            return None
        self._left -= 1
        self._clock += 1
        if self._thinking and self._thinking[0][0] <= self._clock:
            history = heapq.heappop(self._thinking)[2]
        else:
            popular = min(int(self._rng.paretovariate(0.8)) - 1, SYSTEM_PROMPTS - 1)
            history = list(self._systems[popular])
        prompt = history + self._tokens(self._length(60, 1.2))
        answer = self._length(80, 1.0)
        if len(prompt) + answer > MAX_TOKENS:
            prompt = prompt[: MAX_TOKENS - answer]
        return SequenceState(prompt, SamplingParams(max_tokens=answer))

    def answered(self, sequence: SequenceState) -> None:
        """Two of three readers go on."""
        if self._rng.random() < 2 / 3 and len(sequence.token_ids) < MAX_TOKENS // 2:
            heapq.heappush(
                self._thinking, (self._clock + self._rng.randrange(20, 400), sequence.id, sequence.token_ids)
            )

    def token(self) -> int:
        return self._rng.randrange(60_000)


def simulate(num_requests: int, num_blocks: int, at_once: int, max_sequences: int, seed: int) -> dict[str, float]:
    """at_once: requests that run or wait. Returns the figures."""
    scheduler, day, ideal = (
        Scheduler(max_sequences, 512, num_blocks * BLOCK),
        Day(num_requests, seed),
        IdealCache(num_blocks),
    )
    blocks = scheduler.blocks
    open_requests, num_steps, num_copies, most_copies, answered, seconds = 0, 0, 0, 0, 0, 0.0
    while True:
        while open_requests < at_once and (sequence := day.next()) is not None:
            scheduler.add(sequence)
            open_requests += 1
        if not open_requests:
            break
        begun = time.perf_counter()
        step = scheduler.schedule()
        seconds += time.perf_counter() - begun
        num_steps += 1
        num_copies += len(step.copies)
        most_copies = max(most_copies, len(step.copies))
        for each in step.scheduled:
            begun, is_sampled = time.perf_counter(), each.is_sampled
            scheduler.computed(each)
            if is_sampled and each.sequence.append(day.token()):
                scheduler.finish(each.sequence)
            seconds += time.perf_counter() - begun
            if each.sequence.state == "finished":
                open_requests -= 1
                answered += 1
                ideal.use(each.sequence.token_ids, each.sequence.num_prompt_tokens)
                day.answered(each.sequence)
        assert blocks.num_used + blocks.num_free == blocks.num_blocks, "a block is lost"
    assert blocks.num_used == 0, "blocks of finished requests are in use"
    counters = scheduler.counters
    return {
        "requests": answered,
        "steps": num_steps,
        "microseconds_per_step": 1e6 * seconds / num_steps,
        "prompt_tokens": counters.prompt_tokens,
        "hit_rate": counters.cached_tokens / counters.prompt_tokens,
        "ideal_hit_rate": ideal.hits / ideal.tokens,
        "preemptions": counters.preemptions,
        "copied_blocks_per_step": num_copies / num_steps,
        "most_copied_blocks_in_a_step": most_copies,
        "blocks_in_use_at_the_end": blocks.num_used,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--blocks", type=int, default=4096, help=f"of {BLOCK} tokens")
    parser.add_argument("--at-once", type=int, default=96, help="requests that run or wait")
    parser.add_argument("--sequences", type=int, default=64, help="that run at once")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = simulate(arguments.requests, arguments.blocks, arguments.at_once, arguments.sequences, arguments.seed)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
