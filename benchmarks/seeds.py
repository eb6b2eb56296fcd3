"""Counts how many seeded answers of the demonstration model are the same alone and among 15 others.

python -m benchmarks.seeds --precision float32 float16 bfloat16 --answers 100
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable
from contextlib import closing

from benchmarks.demo import QUESTIONS, conversation, demo
from models.family import LoadedNetwork
from serving.engine.interface import EngineLimits, SamplingParams
from serving.engine.native.device import kv_dtype
from serving.engine.native.engine import NativeEngine
from serving.engine.output_queue import OutputQueue
from serving.engine.outputs import TokenOutput


async def answer(engine: NativeEngine, prompt: list[int], seed: int, stop_token_ids: frozenset[int]) -> list[int]:
    sampling = SamplingParams(64, temperature=0.95, top_p=0.7, seed=seed, stop_token_ids=stop_token_ids)
    token_ids: list[int] = []
    with closing(OutputQueue[TokenOutput]()) as queue:
        engine.generate(prompt, [sampling], queue)
        while (outputs := await queue.take()) is not None:
            token_ids += [output.token_id for _, output in outputs]
    return token_ids


async def measure(engine: NativeEngine, loaded: LoadedNetwork, num_answers: int) -> int:
    """The number of answers that are the same."""
    form, rounds = loaded.chat_format, range(num_answers)
    prompts = [form.render(conversation(QUESTIONS[number % len(QUESTIONS)])) for number in rounds]

    def one(number: int) -> Awaitable[list[int]]:
        return answer(engine, prompts[number], number, form.stop_token_ids)

    together = await asyncio.gather(*map(one, rounds))
    return sum([await one(number) == together[number] for number in rounds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--answers", type=int, default=100)
    arguments = parser.parse_args()
    for precision, loaded in demo(arguments.precision).items():
        kept = kv_dtype(loaded.network.device, precision, loaded.network.dtype)
        engine = NativeEngine(loaded.network, EngineLimits(16, kv_tokens=16_384, kv_dtype=kept))
        engine.start()
        num_same = asyncio.run(measure(engine, loaded, arguments.answers))
        engine.stop()
        print(f"{precision}: {num_same} of {arguments.answers} answers are the same")


if __name__ == "__main__":
    main()
