"""One prompt of BentoML's own clients -> its answer as a stream of text, through the pipeline of the OpenAI routes."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import bentoml
from starlette.requests import Request

from serving.engine.interface import SamplingParams
from serving.generation.interface import Conversation, Message, TextDelta
from serving.generation.pipeline import ChatJob
from serving.http.errors import envelope, invalid, traceback_for_log
from serving.http.request_context import request_context
from serving.openai.common import build_prompt
from serving.openai.errors import from_exception
from serving.openai.start_generation import GenerationStarter
from serving.registry import ModelRegistry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateRequest:
    """The parameters of `/generate`."""

    prompt: str
    system: str
    temperature: float
    top_p: float
    max_tokens: int  # at most; fewer if the context ends before


async def generate_response(
    generations: GenerationStarter, ctx: bentoml.Context, registry: ModelRegistry, body: GenerateRequest
) -> AsyncGenerator[str, None]:
    """The same as `generate_text`; a failure before the first text becomes an HTTP error like the other routes'.

    BentoML would answer 5xx without a reason, and write the exception, which may quote the prompt, to the log.
    """
    has_begun = False
    try:
        async with aclosing(generate_text(generations, ctx.request, registry, body)) as texts:
            async for text in texts:
                has_begun = True
                yield text
    except Exception as error:
        if has_begun:
            raise
        failure = from_exception(error)
        context = request_context(ctx.request.scope)
        context.error_code = failure.code
        if failure.status >= 500:
            logger.error("request %s failed with %s%s", context.request_id, failure, traceback_for_log(error, failure))
        ctx.response.status_code = failure.status
        ctx.response.metadata.update({**failure.headers, "content-type": "application/json"})
        yield envelope(failure)


async def generate_text(
    generations: GenerationStarter, request: Request, registry: ModelRegistry, body: GenerateRequest
) -> AsyncGenerator[str, None]:
    """The text of the answer, piece by piece, without what the model thinks before. Raises APIError."""
    model = await generations.chat_model(request, registry.default.name)
    if not (0 <= body.temperature <= 2 and 0 <= body.top_p <= 1 and body.max_tokens >= 1):
        raise invalid("temperature must be 0 to 2, top_p 0 to 1, max_tokens at least 1", None)
    system = (Message("system", body.system),) if body.system else ()
    conversation = Conversation((*system, Message("user", body.prompt)))
    sampling = SamplingParams(max_tokens=body.max_tokens, temperature=body.temperature, top_p=body.top_p)
    with generations.admit(request, model, 1) as admitted:
        prompt = await build_prompt(model, ChatJob(conversation, sampling, max_tokens_is_default=True), "prompt")
        stream = admitted.open([prompt])
    try:
        while (events := await stream.take()) is not None:
            text = "".join(event.text for _, event in events if isinstance(event, TextDelta))
            if text:
                yield text
    finally:
        stream.close()
