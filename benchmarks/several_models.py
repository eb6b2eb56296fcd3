"""Two models of one server: how they share the processor, and how long a stream stands still while another loads.

CHATGLM_MODELS=chatglm2-demo,smollm2,minilm make serve
python -m benchmarks.several_models http://localhost:8000/v1 smollm2 chatglm2-demo --loading minilm
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field

import httpx2


@dataclass
class Timed:
    """One stream: when its events came, in seconds."""

    times: list[float] = field(default_factory=list[float])

    @property
    def per_second(self) -> float:
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


async def stream(http: httpx2.AsyncClient, model: str, num_tokens: int, until: asyncio.Event | None = None) -> Timed:
    """With the documented temperature and top_p. until: then it is given up."""
    messages = [{"role": "user", "content": "Tell me a long story about a river."}]
    body = {"model": model, "messages": messages, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    timed = Timed()
    async with http.stream("POST", "chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                timed.times.append(time.monotonic())
            if until is not None and until.is_set():
                break
    return timed


async def sharing(http: httpx2.AsyncClient, models: list[str], num_tokens: int) -> dict[str, object]:
    """Tokens per second of each model alone, and of each while both are busy all the time."""
    alone = {model: (await stream(http, model, num_tokens)).per_second for model in models}
    enough = asyncio.Event()

    async def busy(model: str) -> Timed:
        return await stream(http, model, 2000, enough)

    tasks = [asyncio.create_task(busy(model)) for model in models]
    await asyncio.sleep(10)
    enough.set()
    together = dict(zip(models, [(await task).per_second for task in tasks], strict=True))
    shares = {model: round(together[model] / alone[model], 3) for model in models}
    return {"alone": alone, "together": together, "share": shares}


async def stall(http: httpx2.AsyncClient, model: str, loading: str) -> dict[str, float]:
    """Gaps between tokens of a stream while another model is loaded."""
    await http.post(f"models/{loading}/unload")
    loaded = asyncio.Event()
    running = asyncio.create_task(stream(http, model, 2000, loaded))
    await asyncio.sleep(2)
    begun = time.monotonic()
    (await http.post(f"models/{loading}/load")).raise_for_status()
    seconds = time.monotonic() - begun
    loaded.set()
    timed = await running
    quiet = [after - before for before, after in zip(timed.times, timed.times[1:], strict=False) if after < begun]
    during = sorted(
        after - before for before, after in zip(timed.times, timed.times[1:], strict=False) if after >= begun
    )
    return {
        "load_seconds": seconds,
        "median_gap_ms": 1000 * statistics.median(quiet),
        "p99_gap_ms_while_loading": 1000 * during[int(len(during) * 0.99) - 1],
        "longest_gap_ms_while_loading": 1000 * during[-1],
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url")
    parser.add_argument("models", nargs=2)
    parser.add_argument("--loading", required=True, help="the model that is unloaded and loaded")
    parser.add_argument("--tokens", type=int, default=200)
    arguments = parser.parse_args()
    async with httpx2.AsyncClient(base_url=arguments.base_url.rstrip("/") + "/", timeout=600) as http:
        for model in (*arguments.models, arguments.loading):
            (await http.post(f"models/{model}/load")).raise_for_status()
        measured = {
            "sharing": await sharing(http, arguments.models, arguments.tokens),
            "stall": [await stall(http, arguments.models[0], arguments.loading) for _ in range(3)],
        }
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
