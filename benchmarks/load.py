"""Sends requests to one OpenAI-compatible server, or alternately to two (A B A B), and reports latencies and ratios.

    python -m benchmarks.load --a http://127.0.0.1:8000/v1 --b http://127.0.0.1:8001/v1 --model quarter \\
        --concurrency 1 4 16 64 --prompt-tokens 64 --new-tokens 64 --rounds 3 --json benchmarks/results/DATE-vllm.json

Prompts are token ids sent to /completions, so that every server computes the same number of tokens; --chat sends words
to /chat/completions, for servers without the other endpoint. Closed loop: --concurrency requests in flight. Open loop:
--rate requests per second, independent of the responses. --beside-rate adds long prompts during the measurement, to
show their effect on the gaps between tokens. Tokens are sampled with the documented temperature and top_p: greedy text
of random weights repeats itself, which draft tokens by prompt lookup gain from. Times are measured by the client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil

VOCABULARY = range(1000, 60_000)
PAUSE_SECONDS = 3.0  # between the servers' turns: some servers' idle threads spin for a second and slow the other one


@dataclass
class Sample:
    """One request measured by the client: the seconds from sending it to each piece of text."""

    arrivals: list[float] = field(default_factory=list[float])
    num_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Load:
    """The requests of one round."""

    model: str
    num_requests: int
    concurrency: int
    prompt_tokens: int
    new_tokens: int
    rate: float | None
    chat: bool
    greedy: bool = False
    beside_tokens: int = 0  # length of the prompts sent during the measured requests
    beside_rate: float = 0.0  # of these prompts per second


async def measure(base_url: str, load: Load, seed: str) -> tuple[list[Sample], float]:
    """(the requests of one round, the seconds that it took)"""
    rng = random.Random(seed)
    bodies = [_body(load, rng) for _ in range(load.num_requests)]
    path = "/chat/completions" if load.chat else "/completions"
    in_flight = asyncio.Semaphore(load.concurrency if load.rate is None else load.num_requests)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=load.concurrency)
    async with httpx.AsyncClient(base_url=base_url, timeout=3600, limits=limits) as client:

        async def one(number: int, body: dict[str, object]) -> Sample:
            if load.rate is not None:
                await asyncio.sleep(number / load.rate)
            async with in_flight:
                return await _request(client, path, body)

        beside = asyncio.create_task(_send_beside(client, path, load, rng))
        begun = time.perf_counter()
        samples = await asyncio.gather(*(one(i, body) for i, body in enumerate(bodies)))
        seconds = time.perf_counter() - begun
        beside.cancel()
        return list(samples), seconds


async def _send_beside(client: httpx.AsyncClient, path: str, load: Load, rng: random.Random) -> None:
    """Send long prompts with short answers until the task is cancelled; their answers are not counted."""
    long = replace(load, prompt_tokens=load.beside_tokens, new_tokens=4)
    async with asyncio.TaskGroup() as group:
        while load.beside_rate:
            group.create_task(_request(client, path, _body(long, rng)))
            await asyncio.sleep(1 / load.beside_rate)


def _body(load: Load, rng: random.Random) -> dict[str, object]:
    ids = rng.choices(VOCABULARY, k=load.prompt_tokens)
    common: dict[str, object] = {
        "model": load.model,
        "max_tokens": load.new_tokens,
        **({"temperature": 0} if load.greedy else {"temperature": 0.95, "top_p": 0.7}),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.chat:
        return common | {"messages": [{"role": "user", "content": " ".join(f"w{i}" for i in ids)}]}
    return common | {"prompt": ids, "ignore_eos": True}


async def _request(client: httpx.AsyncClient, path: str, body: dict[str, object]) -> Sample:
    sample = Sample()
    begun = time.perf_counter()
    try:
        async with client.stream("POST", path, json=body) as reply:
            if reply.status_code != 200:
                sample.error = f"{reply.status_code} {(await reply.aread())[:200]!r}"
                return sample
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if chunk.get("usage"):
                    sample.num_tokens = chunk["usage"]["completion_tokens"]
                if chunk["choices"] and _has_text(chunk["choices"][0]):
                    sample.arrivals.append(time.perf_counter() - begun)
    except httpx.HTTPError as error:
        sample.error = repr(error)
    return sample


def _has_text(choice: dict[str, object]) -> bool:
    delta = choice.get("delta")
    return bool(choice.get("text") or (isinstance(delta, dict) and delta.get("content")))


def summary(samples: list[Sample], seconds: float, before: Usage, after: Usage) -> dict[str, float]:
    """The figures of one round. Times in milliseconds."""
    good = [s for s in samples if s.error is None and s.arrivals]
    first = [s.arrivals[0] * 1000 for s in good]
    per_token = [1000 * (s.arrivals[-1] - s.arrivals[0]) / (s.num_tokens - 1) for s in good if s.num_tokens > 1]
    gaps = [1000 * (b - a) for s in good for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)]
    return {
        "tokens_per_second": sum(s.num_tokens for s in good) / seconds,
        "ttft_ms_p50": _quantile(first, 0.5),
        "ttft_ms_p99": _quantile(first, 0.99),
        "tpot_ms_p50": _quantile(per_token, 0.5),
        "gap_ms_p50": _quantile(gaps, 0.5),
        "gap_ms_p99": _quantile(gaps, 0.99),
        "errors": float(len(samples) - len(good)),
        "cpu_seconds": after.cpu_seconds - before.cpu_seconds,
        "main_thread_seconds": after.main_seconds - before.main_seconds,
        "memory_gib": after.memory / 2**30,
    }


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


@dataclass(frozen=True)
class Usage:
    """Resources that a process and its children have used so far."""

    cpu_seconds: float = 0.0
    main_seconds: float = 0.0  # of the main threads alone: in this server HTTP, BentoML and JSON without the engine
    memory: int = 0  # bytes


def _usage(process: psutil.Process | None) -> Usage:
    if process is None:
        return Usage()
    family = [process, *process.children(recursive=True)]
    main = (thread for p in family for thread in p.threads() if thread.id == p.pid)
    return Usage(
        sum(sum(p.cpu_times()[:2]) for p in family),
        sum(thread.user_time + thread.system_time for thread in main),
        sum(p.memory_info().rss for p in family),
    )


def compare(servers: dict[str, str], pids: dict[str, int], load: Load, rounds: int) -> dict[str, dict[str, float]]:
    """Alternate rounds between the servers; the median of each figure by server, after one warm-up round each."""
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    begun = time.monotonic()
    run = random.getrandbits(32)  # new prompts for each run, which no server has in its prefix cache
    for number in range(rounds + 1):
        for turn, (name, url) in enumerate(servers.items(), 1):
            process = psutil.Process(pids[name]) if name in pids else None
            time.sleep(PAUSE_SECONDS)
            before = _usage(process)
            samples, seconds = asyncio.run(measure(url, load, seed=f"{run}-{number}"))
            _print_progress(number * len(servers) + turn, (rounds + 1) * len(servers), begun, load)
            if number:
                figures[name].append(summary(samples, seconds, before, _usage(process)))
            for error in {s.error for s in samples if s.error}:
                print(f"  {name}: {error}")
    return {
        name: {key: statistics.median(one[key] for one in many) for key in many[0]} for name, many in figures.items()
    }


def _print_progress(done: int, total: int, begun: float, load: Load) -> None:
    """On one line of a terminal, or a line each time where stderr is no terminal."""
    left = (time.monotonic() - begun) / done * (total - done)
    line = f"  {load.concurrency} concurrent: {done} of {total} turns, {int(left) // 60}:{int(left) % 60:02d} left"
    print(line, end="\r" if sys.stderr.isatty() and done < total else "\n", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--a", required=True, help="base URL of the server")
    parser.add_argument("--b", help="base URL of the server to compare with")
    parser.add_argument("--pid-a", type=int, help="process id of server a, for CPU and memory")
    parser.add_argument("--pid-b", type=int, help="process id of server b")
    parser.add_argument("--model", required=True)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests-each", type=int, default=2, help="requests of a round per concurrent one")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, help="open loop: requests per second")
    parser.add_argument("--beside-tokens", type=int, default=1000, help="length of the additional prompts")
    parser.add_argument("--beside-rate", type=float, default=0.0, help="additional prompts per second; none by default")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--greedy", action="store_true", help="not the documented temperature and top_p")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    servers = {"a": arguments.a} | ({"b": arguments.b} if arguments.b else {})
    pids = {name: pid for name, pid in (("a", arguments.pid_a), ("b", arguments.pid_b)) if pid}
    results: list[dict[str, object]] = []
    for concurrency in arguments.concurrency:
        load = Load(
            arguments.model,
            concurrency * arguments.requests_each,
            concurrency,
            arguments.prompt_tokens,
            arguments.new_tokens,
            arguments.rate,
            arguments.chat,
            arguments.greedy,
            arguments.beside_tokens,
            arguments.beside_rate,
        )
        figures = compare(servers, pids, load, arguments.rounds)
        for name, values in figures.items():
            print(f"c={concurrency:<3} {name}: " + "  ".join(f"{key} {value:.1f}" for key, value in values.items()))
        ratio = None
        if "b" in figures:
            ratio = figures["a"]["tokens_per_second"] / figures["b"]["tokens_per_second"]
            print(f"c={concurrency:<3} a/b tokens per second: {ratio:.2f}", flush=True)
        results.append({"concurrency": concurrency, "figures": figures, "ratio": ratio})
    if arguments.json:
        report = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "load": vars(arguments) | {"json": None}}
        arguments.json.write_text(json.dumps(report | {"results": results}, indent=1))


if __name__ == "__main__":
    main()
