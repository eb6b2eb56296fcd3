"""Measures the speed-up of prompt lookup decoding for one stream of the demonstration model.

    python -m benchmarks.prompt_lookup --json benchmarks/results/DATE-prompt-lookup.json

Fresh: a first question, so the prompt does not contain the answer. Quoting: the same question again, with the first
answer in the history. Each with and without drafts, A B A B in one run; the answers are checked to be equal. `--cost`
measures on the quarter shape the time of a step of 1 + 4 rows relative to a step of one row: the cost of a wrong draft.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.demo import QUESTIONS, conversation, demo
from benchmarks.engine import measure
from benchmarks.shapes import random_model
from models.family import LoadedNetwork
from models.networks.flat_decoder import FlatDecoder
from models.store.progress import no_progress
from serving.engine.interface import SamplingParams
from serving.engine.native.device import num_usable_cores
from serving.engine.native.model_runner import ModelRunner
from serving.engine.native.prompt_lookup import MAX_DRAFT
from serving.engine.native.scheduler import Scheduler
from serving.engine.native.sequence import SequenceState

MAX_TOKENS = 64
WITH_DRAFTS = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
PLAIN = SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, top_k=1)  # greedy as well, but without drafts


def answer(model: LoadedNetwork, prompt_ids: Sequence[int], sampling: SamplingParams) -> tuple[list[int], int, float]:
    """(tokens, steps, seconds) of one answer, from the scheduler and the model runner called as the engine does."""
    scheduler = Scheduler(1, 512, len(prompt_ids) + 2 * MAX_TOKENS)
    runner = ModelRunner(model.network, scheduler.num_tokens)
    sequence = SequenceState(list(prompt_ids), sampling, seed=1)
    scheduler.add(sequence)
    steps, begun, reason = 0, time.perf_counter(), None
    while reason is None:
        plan = scheduler.schedule()
        results = runner.run(plan)
        steps += 1
        for each in plan.scheduled:
            scheduler.computed(each)
        for each, sampled in results:
            drafts = (None, *each.draft)
            for draft, before, token in zip(drafts, (None, *sampled), sampled, strict=False):
                if reason is not None or (draft is not None and (before is None or draft != before.token_id)):
                    break
                sequence.num_computed += draft is not None
                is_end = token.token_id in model.chat_format.stop_token_ids
                reason = sequence.append(token.token_id) or ("stop" if is_end else None)
    return sequence.token_ids[len(prompt_ids) :], steps, time.perf_counter() - begun


def compare(model: LoadedNetwork, rounds: int) -> list[dict[str, float | str]]:
    """Tokens per step and the ratio of times, for fresh and for quoting answers."""
    results: list[dict[str, float | str]] = []
    fresh = [model.chat_format.render(conversation(question)) for question in QUESTIONS]
    answers = [model.chat_format.decode(answer(model, ids, PLAIN)[0]) for ids in fresh]
    quoting = [model.chat_format.render(conversation(q, q, text)) for q, text in zip(QUESTIONS, answers, strict=True)]
    for name, prompts in (("fresh", fresh), ("quoting", quoting)):
        ratios, tokens, steps = list[float](), 0, 0
        for _ in range(rounds):
            for ids in prompts:
                plain, _, plain_seconds = answer(model, ids, PLAIN)
                drafted, num_steps, seconds = answer(model, ids, WITH_DRAFTS)
                assert drafted == plain, "a draft changed an answer"
                ratios.append(plain_seconds / seconds)
                tokens, steps = tokens + len(drafted), steps + num_steps
        results.append({"workload": name, "tokens_per_step": tokens / steps, "speedup": statistics.median(ratios)})
    return results


def draft_step_cost() -> float:
    """Duration of a step of 1 + MAX_DRAFT rows divided by that of one row, quarter shape, 16-bit weights."""
    network = FlatDecoder(random_model("quarter", torch.bfloat16), "bfloat16", 64_794, 8192, no_progress)
    one, five = (statistics.median(measure(network, rows, 64, 16)[1] for _ in range(3)) for rows in (1, 1 + MAX_DRAFT))
    return five / one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(num_usable_cores())
    results = compare(demo(["float32"])["float32"], arguments.rounds)
    for result in results:
        print("{workload:8} {tokens_per_step:.2f} tokens per step, {speedup:.2f} times as fast".format(**result))
    report: dict[str, object] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "results": results}
    if arguments.cost:
        report["draft_step_cost"] = draft_step_cost()
        print(f"a step with a draft of {MAX_DRAFT} tokens takes {report['draft_step_cost']:.2f} times one without")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
