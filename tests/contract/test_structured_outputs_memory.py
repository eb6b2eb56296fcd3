"""Memory over requests whose schemas and tools are never repeated."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import httpx2
import psutil
from starlette.applications import Starlette

from serving.generation.structured.token_masks import GrammarMask
from tests.contract.test_structured_outputs import ASK, CITY, json_schema
from tests.contract.tiny import serving


def fresh_request(number: int) -> dict[str, Any]:
    """A request whose schema, or every fourth time whose tool, no request had before."""
    body = {**ASK, "messages": [{"role": "user", "content": f"{number} hello how are you today?"}], "max_tokens": 2}
    if number % 4:
        names = [f"property_{i}" for i in range(100)]
        properties = {name: {"enum": [f"{name}_{i}_{number}" for i in range(6)]} for name in names}
        schema = {"type": "object", "properties": properties, "required": names}
        return {**body, "response_format": json_schema(schema)}
    function = {"name": f"f{number}", "parameters": CITY}
    return {**body, "tools": [{"type": "function", "function": function}], "tool_choice": "required"}


def test_memory_stays_flat_over_schemas_and_tools_that_are_never_repeated(folder: Path) -> None:
    """Finished sequences, kept for the KV slots of their prefix, once kept their masks, and these their grammars:
    0.8 MiB a request without end, and 109 MiB here. Now it is 18 MiB here, and flat after the 1,000th request."""

    async def ask(application: Starlette) -> list[float]:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(application), base_url="http://test") as http:
            resident: list[float] = []
            for number in range(300):
                reply = await http.post("/chat/completions", json=fresh_request(number))
                assert reply.status_code == 200, reply.text
                resident.append(psutil.Process().memory_info().rss / 2**20)
            return resident

    with serving(folder, context=2**17) as application:  # a large cache, so that no sequence is evicted
        resident = asyncio.run(ask(application))
        gc.collect()
        assert sum(type(thing) is GrammarMask for thing in gc.get_objects()) < 20
    assert resident[-1] - resident[120] < 50, resident[::30]
