"""Mixed load on several models that do not fit into the memory together: what is answered, refused and lost.

CHATGLM_MODELS=chatglm2-demo,smollm2,minilm CHATGLM_MEMORY_GIB=1 make serve
python -m benchmarks.mixed_models http://localhost:8000/v1 --chat chatglm2-demo smollm2 --embed minilm --pid PID
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx2
import psutil

TEXTS = [f"Text number {number} about rivers, mountains and the sea." for number in range(8)]


@dataclass
class Load:
    """Clients that ask one model after the other and try again when a model has no memory now."""

    http: httpx2.AsyncClient
    chat: list[str]
    embed: list[str]
    counts: Counter[str] = field(default_factory=Counter[str])
    faults: list[str] = field(default_factory=list[str])
    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    vectors: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    most_memory: float = 0.0

    async def client(self, number: int, until: float) -> None:
        choice = random.Random(number)
        while time.monotonic() < until:
            model = choice.choice(self.chat + self.embed)
            begun = time.monotonic()
            await (self._embed(model) if model in self.embed else self._chat(model, choice))
            self.seconds.setdefault(model, []).append(time.monotonic() - begun)
            await asyncio.sleep(choice.random())

    async def _post(self, path: str, body: dict[str, Any]) -> httpx2.Response | None:
        """The answer, after as many 503 as there are; None if it is another error."""
        while True:
            reply = await self.http.post(path, json=body)
            if reply.status_code != 503:
                break
            self.counts[f"{body['model']}: 503 {reply.json()['error']['code']}"] += 1
            await asyncio.sleep(float(reply.headers["retry-after"]))
        if reply.status_code == 200:
            self.counts[f"{body['model']}: answered"] += 1
            return reply
        self.faults.append(f"{body['model']}: {reply.status_code} {reply.text[:200]}")
        return None

    async def _chat(self, model: str, choice: random.Random) -> None:
        wanted = choice.randrange(8, 65)
        messages = [{"role": "user", "content": f"Tell me story number {choice.randrange(100)}."}]
        is_stream = choice.random() < 0.5
        options = {"stream": True, "stream_options": {"include_usage": True}} if is_stream else {}
        body = {"model": model, "messages": messages, "max_tokens": wanted, "ignore_eos": True, **options}
        reply = await self._post("chat/completions", body)
        if reply is None:
            return
        if is_stream:
            lines = [line for line in reply.text.splitlines() if line.startswith("data: ")]
            if lines[-1] != "data: [DONE]":
                self.faults.append(f"{model}: a stream ends with {lines[-1][:200]}")
                return
            usage = json.loads(lines[-2].removeprefix("data: "))["usage"]
        else:
            usage = reply.json()["usage"]
        if usage["completion_tokens"] != wanted:
            self.faults.append(f"{model}: {usage['completion_tokens']} tokens instead of {wanted}")

    async def _embed(self, model: str) -> None:
        reply = await self._post("embeddings", {"model": model, "input": TEXTS})
        if reply is None:
            return
        vectors = [each["embedding"] for each in reply.json()["data"]]
        for text, vector in zip(TEXTS, vectors, strict=True):
            known = self.vectors.setdefault(f"{model} {text}", vector)
            if max(abs(a - b) for a, b in zip(known, vector, strict=True)) > 1e-4:
                self.faults.append(f"{model}: another vector of {text!r}")

    async def watch_memory(self, pid: int) -> None:
        """The most resident memory of a process and its children, in MiB."""
        parent = psutil.Process(pid)
        while True:
            processes = [parent, *parent.children(recursive=True)]
            self.most_memory = max(self.most_memory, sum(each.memory_info().rss for each in processes) / 2**20)
            await asyncio.sleep(0.5)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    timeout = httpx2.Timeout(600)
    async with httpx2.AsyncClient(base_url=arguments.url.rstrip("/") + "/", timeout=timeout) as http:
        load = Load(http, arguments.chat, arguments.embed)
        watching = asyncio.create_task(load.watch_memory(arguments.pid)) if arguments.pid else None
        until = time.monotonic() + arguments.seconds
        await asyncio.gather(*(load.client(number, until) for number in range(arguments.clients)))
        if watching is not None:
            watching.cancel()
        medians = {name: round(statistics.median(seconds), 3) for name, seconds in load.seconds.items()}
        return {
            "counts": dict(sorted(load.counts.items())),
            "faults": load.faults,
            "median_seconds": medians,
            "most_memory_mib": round(load.most_memory),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--chat", nargs="+", required=True)
    parser.add_argument("--embed", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory")
    print(json.dumps(asyncio.run(run(parser.parse_args())), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
