"""Sends sixteen concurrent questions, which the server answers in one batch, and prints tokens per second."""

import asyncio
import time

from openai import AsyncOpenAI

client = AsyncOpenAI(base_url="http://localhost:8000/v1", api_key="none")


async def ask(question: str) -> int:
    """Returns the number of tokens of the answer."""
    answer = await client.chat.completions.create(
        model="chatglm2-6b", messages=[{"role": "user", "content": question}], temperature=0
    )
    return answer.usage.completion_tokens if answer.usage else 0


async def main() -> None:
    begun = time.perf_counter()
    counts = await asyncio.gather(*(ask("你好" if number % 2 else "hello") for number in range(16)))
    seconds = time.perf_counter() - begun
    print(f"{len(counts)} answers, {sum(counts)} tokens in {seconds:.1f} s: {sum(counts) / seconds:.0f} tokens/s")


asyncio.run(main())
