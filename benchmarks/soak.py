"""Mixed requests at twice the server's capacity for minutes: checks answers, errors, memory and released resources.

`python -m benchmarks.soak --seconds 600` starts a server with the demonstration model and a small cache, asks each
question once for the reference, and then again and again among streams, aborts, bad bodies and refusals. At the end
every KV slot must be free and memory flat. Prints a table; exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tests.e2e.server import Server, serving, totals

MAX_SEQUENCES = 8
MAX_QUEUED = 4  # so few that twice the capacity gets 429s
MAX_RETRY_SECONDS = 1.0
MAX_GROWTH_MIB = 48.0  # after the first quarter; a short run still meets new shapes, whose kernels torch caches
QUESTIONS = ["你好", "你是谁？", "Hello", "1+1等于几？", "What can you do?", "再见", "介绍一下你自己", "谢谢"]
BAD_BODIES: list[bytes] = [
    b"", b"{", b"[]", b"nonsense", b'{"model": "chatglm"}', b'{"model": "chatglm", "messages": []}',
    b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "chatglm", "messages": [{"role": "user", "content": "x"}], "temperature": 9}',
    b'{"model": "chatglm", "messages": [{"role": "user", "content": "x"}], "max_tokens": NaN}',
    b'{"model": "chatglm", "messages": [{"role": "user", "content": "x"}], "max_tokens": 100000000}',
    b"[" * 10_000, b"\xff\xfe", b'{"a": "' + b"x" * 300_000,
]  # fmt: skip


@dataclass
class Tally:
    """Counts and measurements of one run."""

    counts: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    first_token_seconds: list[float] = field(default_factory=list[float])
    num_tokens: int = 0
    memory_mib: list[float] = field(default_factory=list[float])

    def fault(self, what: str) -> None:
        self.wrong.append(what)


def settings() -> dict[str, str]:
    """Environment variables of the server that the soak is meant for."""
    return {
        "CHATGLM_MAX_SEQUENCES": str(MAX_SEQUENCES),
        "CHATGLM_MAX_QUEUED_REQUESTS": str(MAX_QUEUED),
        "CHATGLM_KV_CACHE_GIB": "0.003",  # about 1,500 tokens of the demonstration model: sequences are preempted
        "CHATGLM_THREADS": "1",
        "CHATGLM_ACCESS_LOG": "off",
    }


def bodies() -> list[dict[str, Any]]:
    """Requests with deterministic answers, greedy or with a seed: short, long, n > 1, with a JSON schema."""
    made: list[dict[str, Any]] = []
    for i, question in enumerate(QUESTIONS):
        base = {"model": "chatglm", "messages": [{"role": "user", "content": question}], "temperature": 0}
        made.append({**base, "max_tokens": 40})
        made.append({**base, "max_tokens": 60, "ignore_eos": True})
        made.append({**base, "max_tokens": 24, "n": 2, "temperature": 0.8, "seed": i})
    for question in QUESTIONS[:4]:  # they outgrow the cache together
        messages = [{"role": "user", "content": question}]
        made.append({"model": "chatglm", "messages": messages, "temperature": 0, "max_tokens": 250, "ignore_eos": True})
    long = {"role": "user", "content": "很长的历史。" * 120}
    for i in range(4):
        messages = [long, {"role": "assistant", "content": "好的。"}, {"role": "user", "content": QUESTIONS[i]}]
        made.append({"model": "chatglm", "messages": messages, "temperature": 0, "max_tokens": 20, "ignore_eos": True})
    for question in QUESTIONS[:3]:
        made.append(
            {
                "model": "chatglm",
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
                "max_tokens": 24,
                "response_format": {"type": "json_object"},
            }
        )
    return made


def fresh_body(number: int) -> dict[str, Any]:
    """A request with a JSON schema (about 10 KB), or every fourth time with a tool, that no request had before."""
    body = {"model": "chatglm", "messages": [{"role": "user", "content": f"{number} {QUESTIONS[2]}"}], "max_tokens": 4}
    if number % 4 == 0:
        parameters = {"type": "object", "properties": {f"p{number}": {"type": "string"}}, "required": [f"p{number}"]}
        function = {"name": f"f{number}", "parameters": parameters}
        return {**body, "tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    properties = {f"p{i}": {"enum": [f"value {i} {j} {number}" for j in range(6)]} for i in range(100)}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {**body, "response_format": {"type": "json_schema", "json_schema": {"name": "fresh", "schema": schema}}}


def answer_of(completion: dict[str, Any]) -> str:
    """The part of a completion that must be the same every time."""
    choices = sorted(completion["choices"], key=lambda choice: int(choice["index"]))
    return json.dumps([[choice["message"]["content"], choice["finish_reason"]] for choice in choices])


class Soak:
    """One run against one server."""

    def __init__(self, url: str, http: aiohttp.ClientSession, seed: int, fresh_weight: int = 0) -> None:
        """fresh_weight: of requests with schemas and tools that are never repeated; the others weigh 100 together."""
        self.tally = Tally()
        self._weights = [35, 30, 15, 8, 12, fresh_weight]
        self._num_fresh = 0
        self._chat = f"{url}/v1/chat/completions"
        self._metrics = f"{url}/metrics"
        self._http = http
        self._random = random.Random(seed)
        self._bodies = bodies()
        self._reference: list[str] = []

    async def learn(self) -> None:
        """Sends every request once, alone, for its reference answer."""
        for body in self._bodies:
            async with self._http.post(self._chat, json=body) as reply:
                text = await reply.text()
                if reply.status != 200:
                    raise SystemExit(f"the reference pass failed with {reply.status}: {text}")
                self._reference.append(answer_of(json.loads(text)))

    async def ask_until(self, end: float) -> None:
        """Sends requests of all kinds, one after another, until time.monotonic() reaches `end`."""
        kinds = [self._stream, self._whole, self._abort, self._leave_early, self._bad, self._fresh]
        while time.monotonic() < end:
            (kind,) = self._random.choices(kinds, self._weights)
            number = self._random.randrange(len(self._bodies))
            try:
                await kind(number)
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
                self.tally.fault(f"{kind.__name__}: {type(error).__name__}: {error}")

    @asynccontextmanager
    async def _posted(self, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse | None]:
        """The accepted reply; None after a 429 and the time that its Retry-After names."""
        async with self._http.post(self._chat, json=body) as reply:
            if reply.status == 200:
                yield reply
                return
            error = (await reply.json())["error"]
            if reply.status != 429 or error["code"] != "rate_limit_exceeded" or "retry-after" not in reply.headers:
                self.tally.fault(f"{reply.status}: {error}")
        self.tally.counts["refused (429)"] += 1
        await asyncio.sleep(
            min(float(reply.headers.get("retry-after", "1")), MAX_RETRY_SECONDS) * self._random.random()
        )
        yield None

    async def _whole(self, number: int) -> None:
        async with self._posted(self._bodies[number]) as reply:
            if reply is None:
                return
            completion = json.loads(await reply.text())
        self.tally.num_tokens += completion["usage"]["completion_tokens"]
        self._compare(number, answer_of(completion), "whole")

    async def _stream(self, number: int) -> None:
        started = time.monotonic()
        async with self._posted({**self._bodies[number], "stream": True}) as reply:
            if reply is None:
                return
            parts: dict[int, list[str]] = {}
            reasons: dict[int, str] = {}
            last = ""
            async for line in reply.content:
                text = line.decode().strip()
                if not text.startswith("data: "):
                    continue
                last = text.removeprefix("data: ")
                if last == "[DONE]":
                    break
                chunk = json.loads(last)
                if "error" in chunk:
                    self.tally.fault(f"stream: {chunk['error']}")
                    return
                for choice in chunk["choices"]:
                    if not parts:
                        self.tally.first_token_seconds.append(time.monotonic() - started)
                    parts.setdefault(choice["index"], []).append(choice["delta"].get("content") or "")
                    reasons[choice["index"]] = choice["finish_reason"] or reasons.get(choice["index"], "")
                    self.tally.num_tokens += bool(choice["delta"].get("content"))
        if last != "[DONE]":
            self.tally.fault("a stream ended without [DONE]")
        streamed = json.dumps([["".join(parts[index]), reasons[index]] for index in sorted(parts)])
        self._compare(number, streamed, "streamed")

    async def _abort(self, number: int) -> None:
        async with self._posted({**self._bodies[number], "stream": True}) as reply:
            if reply is None:
                return
            for _ in range(self._random.randrange(8)):
                await reply.content.readline()
            reply.close()
        self.tally.counts["left in the stream"] += 1

    async def _leave_early(self, number: int) -> None:
        try:
            async with asyncio.timeout(self._random.random() * 0.2), self._posted(self._bodies[number]) as reply:
                if reply is not None:
                    await reply.read()
        except TimeoutError:
            self.tally.counts["left before the answer"] += 1

    async def _bad(self, _: int) -> None:
        body = self._random.choice(BAD_BODIES)
        async with self._http.post(self._chat, data=body, headers={"content-type": "application/json"}) as reply:
            error = (await reply.json())["error"]
            # a body that parses is admitted before its content is checked, so a full queue refuses it too
            if reply.status not in (400, 404, 413, 429) or set(error) != {"message", "type", "param", "code"}:
                self.tally.fault(f"bad body: {reply.status} {error}")
        self.tally.counts["bad body"] += 1

    async def _fresh(self, _: int) -> None:
        self._num_fresh += 1
        async with self._posted(fresh_body(self._num_fresh)) as reply:
            if reply is not None:
                self.tally.num_tokens += json.loads(await reply.text())["usage"]["completion_tokens"]
                self.tally.counts["fresh schema or tool"] += 1

    def _compare(self, number: int, answer: str, kind: str) -> None:
        self.tally.counts[kind] += 1
        if answer != self._reference[number]:
            self.tally.fault(f"{kind} {number}: {answer} instead of {self._reference[number]}")

    async def metrics(self) -> dict[str, float]:
        async with self._http.get(self._metrics) as reply:
            return totals(await reply.text())

    async def check_rest(self, seconds: float = 30.0) -> None:
        """Waits until every resource is free; records a fault if one is not after `seconds`."""
        held = {
            "chatglm_num_requests_running": 0.0,
            "chatglm_num_requests_waiting": 0.0,
            "chatglm_num_answers_in_flight": 0.0,
            "chatglm_kv_cache_used_tokens": 0.0,
            "bentoml_service_request_in_progress": 1.0,  # the one that asks
        }
        end = time.monotonic() + seconds
        while True:
            now = await self.metrics()
            left = {name: now[name] for name, most in held.items() if now[name] > most}
            if not left:
                return
            if time.monotonic() > end:
                self.tally.fault(f"still held: {left}")
                return
            await asyncio.sleep(0.2)


async def run(
    server: Server,
    seconds: float,
    num_clients: int,
    seed: int,
    max_growth_mib: float = MAX_GROWTH_MIB,
    fresh_weight: int = 0,
) -> Tally:
    """The whole soak against a running server that was started with `settings()`."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        soak = Soak(server.url, http, seed, fresh_weight)
        await soak.learn()
        started = time.monotonic()
        clients = [asyncio.create_task(soak.ask_until(started + seconds)) for _ in range(num_clients)]
        for part in range(1, 5):
            await asyncio.sleep(max(0.0, started + seconds * part / 4 - time.monotonic()))
            soak.tally.memory_mib.append(memory_mib(server))
        await asyncio.gather(*clients)
        await soak.check_rest()
        soak.tally.counts["preempted"] = int((await soak.metrics())["chatglm_num_preemptions_total"])
        soak.tally.memory_mib.append(memory_mib(server))
        growth = soak.tally.memory_mib[-1] - soak.tally.memory_mib[0]
        if growth > max_growth_mib:
            soak.tally.fault(f"memory grew by {growth:.0f} MiB: {soak.tally.memory_mib}")
        return soak.tally


def memory_mib(server: Server) -> float:
    """Resident memory of the server's processes."""
    parent = psutil.Process(server.process.pid)
    return sum(process.memory_info().rss for process in (parent, *parent.children(recursive=True))) / 2**20


def table(tally: Tally, seconds: float) -> str:
    """The report as text."""
    first = sorted(tally.first_token_seconds) or [0.0]
    rows = [
        *((name, f"{count}") for name, count in sorted(tally.counts.items())),
        ("tokens a second", f"{tally.num_tokens / seconds:.0f}"),
        ("first token, median", f"{first[len(first) // 2] * 1000:.0f} ms"),
        ("first token, 99 of 100", f"{first[len(first) * 99 // 100] * 1000:.0f} ms"),
        ("memory over time", " ".join(f"{value:.0f}" for value in tally.memory_mib) + " MiB"),
        ("wrong", f"{len(tally.wrong)}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=2 * MAX_SEQUENCES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fresh-weight", type=int, default=20, help="of requests with schemas never sent before, against 100 others"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, serving(Path(home), settings()) as server:
        tally = asyncio.run(run(server, given.seconds, given.clients, given.seed, fresh_weight=given.fresh_weight))
        print(table(tally, given.seconds))
        for what in tally.wrong[:20]:
            print(what, file=sys.stderr)
    sys.exit(bool(tally.wrong))


if __name__ == "__main__":
    main()
