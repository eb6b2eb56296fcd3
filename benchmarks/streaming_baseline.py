"""The baseline of `benchmarks.streaming`: a plain Starlette application that sends a fixed event stream.

python -m uvicorn benchmarks.streaming_baseline:app --no-access-log --log-level warning
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from benchmarks.streaming_source import TokenSource

HEAD = (
    '{"id":"chatcmpl-00000000000000000000000000000000","object":"chat.completion.chunk","created":1795364990,'
    '"model":"chatglm2-6b","system_fingerprint":"fp_000000000000","choices":[{"index":0,"delta":'
)
source = TokenSource(float(os.environ["TICK_SECONDS"]))


async def stream(request: Request) -> StreamingResponse:
    body = await request.json()

    async def events() -> AsyncGenerator[str, None]:
        yield f'data: {HEAD}{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}]}}\n\n'
        async for word in source.words(body["max_tokens"]):
            yield f'data: {HEAD}{{"content":"{word}"}},"logprobs":null,"finish_reason":null}}]}}\n\n'
        yield f'data: {HEAD}{{}},"logprobs":null,"finish_reason":"length"}}]}}\n\ndata: [DONE]\n\n'

    return StreamingResponse(events(), media_type="text/event-stream")


app = Starlette(routes=[Route("/v1/chat/completions", stream, methods=["POST"])])
