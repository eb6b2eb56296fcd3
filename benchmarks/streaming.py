"""Measures the server's CPU time per streamed token, against plain uvicorn and Starlette, A B A B in one run.

    python -m benchmarks.streaming --streams 16 --rounds 4 --json benchmarks/results/DATE-streaming.json

Both send the same events to the same clients at the same rate. The CPU time is that of the server process, read from
/proc around each round and divided by the number of events: unlike wall time, other load on the machine hardly
affects it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from tests.e2e.server import environment, free_port

CONVERSATION = [{"role": "user", "content": "你好"}]


@dataclass(frozen=True)
class Target:
    """A running server."""

    port: int
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """User and system time of the process and its children."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in family)


@dataclass(frozen=True)
class Round:
    """The measurement of one server in one round."""

    events: int
    cpu_seconds: float
    wall_seconds: float

    @property
    def microseconds(self) -> float:
        return self.cpu_seconds / self.events * 1e6


async def read_stream(port: int, num_tokens: int) -> int:
    """Request one stream and read it to its end. Returns the number of events."""
    body = {"model": "chatglm2-6b", "messages": CONVERSATION, "max_tokens": num_tokens, "stream": True}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    count, last = 0, b""
    while piece := await reader.read(1 << 16):
        count += piece.count(b"data: ")
        last = (last + piece)[-40:]
    writer.close()
    assert b"[DONE]" in last, last
    return count - 1


async def measure(target: Target, num_streams: int, num_tokens: int) -> Round:
    before, begun = target.cpu_seconds(), time.perf_counter()
    counts = await asyncio.gather(*(read_stream(target.port, num_tokens) for _ in range(num_streams)))
    assert set(counts) == {num_tokens + 2}, counts
    return Round(sum(counts), target.cpu_seconds() - before, time.perf_counter() - begun)


@contextmanager
def running(command: list[str], port: int, extra: dict[str, str]) -> Iterator[Target]:
    with tempfile.TemporaryDirectory() as home:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
            env={**environment(Path(home)), **extra},
            stdout=subprocess.DEVNULL,
        )
        try:
            yield Target(port, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(60)


async def wait_until_ready(target: Target, seconds: float = 180.0) -> None:
    """Wait until one stream has completed."""
    until = time.monotonic() + seconds
    while True:
        try:
            await read_stream(target.port, 2)
            return
        except (OSError, AssertionError):
            if time.monotonic() > until or not target.process.is_running():
                raise
            await asyncio.sleep(0.5)


async def compare(options: argparse.Namespace) -> dict[str, list[Round]]:
    extra = {"TICK_SECONDS": str(options.tick), "CHATGLM_THREADS": "1"}
    quiet = ["--no-access-log", "--log-level", "warning"]
    rounds: dict[str, list[Round]] = {"plain": [], "service": []}
    with (
        running(["uvicorn", "benchmarks.streaming_baseline:app", *quiet], free_port(), extra) as plain,
        running(["bentoml", "serve", "benchmarks.streaming_service:svc"], free_port(), extra) as service,
    ):
        targets = {"plain": plain, "service": service}
        for target in targets.values():
            await wait_until_ready(target)
            await measure(target, options.streams, 20)  # warm-up
        for _ in range(options.rounds):
            for name, target in targets.items():
                rounds[name].append(await measure(target, options.streams, options.tokens))
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tick", type=float, default=0.01, help="seconds between two tokens of one stream")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds = asyncio.run(compare(options))
    medians = {name: statistics.median(one.microseconds for one in every) for name, every in rounds.items()}
    ratio = medians["service"] / medians["plain"]
    for name, every in rounds.items():
        figures = " ".join(f"{one.microseconds:.1f}" for one in every)
        print(f"{name:8} {medians[name]:6.1f} us of CPU per token   rounds: {figures}")
    print(f"ratio {ratio:.2f}")
    if options.json:
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python -m benchmarks.streaming", *sys.argv[1:]]),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "microseconds_of_cpu_per_token": {
                name: [one.microseconds for one in every] for name, every in rounds.items()
            },
            "wall_seconds": {name: [one.wall_seconds for one in every] for name, every in rounds.items()},
            "median_ratio": ratio,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
