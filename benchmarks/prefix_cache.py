"""Measures the time to the first token without and with a cached prefix, on a running server.

    python -m benchmarks.prefix_cache --url http://127.0.0.1:8000/v1 --model quarter --history 2000

Each conversation sends a random prompt, then the same prompt with 16 more tokens, as the next round of a conversation
would. Prints the medians of --rounds conversations.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx

NEW_TOKENS = 16  # added in the second round


def first_token(client: httpx.Client, model: str, prompt: list[int]) -> tuple[float, int]:
    """(seconds to the first piece of text, prompt tokens reused from the cache)"""
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    begun, seconds, cached = time.perf_counter(), 0.0, 0
    with client.stream("POST", "/completions", json=body) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk["choices"] and chunk["choices"][0]["text"] and not seconds:
                seconds = time.perf_counter() - begun
            if chunk.get("usage"):
                cached = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
    return seconds, cached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--history", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rng = random.Random()
    cold, warm = list[float](), list[float]()
    with httpx.Client(base_url=arguments.url, timeout=600) as client:
        for _ in range(arguments.rounds):
            history = rng.choices(range(1000, 60_000), k=arguments.history)
            cold.append(first_token(client, arguments.model, history)[0])
            seconds, cached = first_token(client, arguments.model, history + history[:NEW_TOKENS])
            assert cached >= arguments.history - 1, f"only {cached} tokens were reused"
            warm.append(seconds)
    report = {"cold_ms": 1000 * statistics.median(cold), "warm_ms": 1000 * statistics.median(warm)}
    report["ratio"] = report["warm_ms"] / report["cold_ms"]
    print("first round {cold_ms:.0f} ms, second round {warm_ms:.0f} ms, ratio {ratio:.3f}".format(**report))
    if arguments.json:
        head = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "history": arguments.history}
        arguments.json.write_text(json.dumps(head | report, indent=1) + "\n")


if __name__ == "__main__":
    main()
