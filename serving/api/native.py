"""One question, one stream of text: what BentoML's own clients call. The same pipeline as the OpenAI routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from bentoml.exceptions import InvalidArgument, ServiceUnavailable

from serving.chat.pipeline import ChatJob, ServedModel
from serving.chat.types import Conversation, Message, PromptError, TextDelta
from serving.engine.types import SamplingParams


async def ask(
    model: ServedModel | None, prompt: str, system: str, temperature: float, top_p: float, max_tokens: int
) -> AsyncGenerator[str, None]:
    """The answer's text as it comes, at most `max_tokens` and what the context has room for. Raises BentoML's InvalidArgument for what cannot be asked."""
    if model is None:
        raise ServiceUnavailable("the model is still loading")
    if not (0 <= temperature <= 2 and 0 <= top_p <= 1 and max_tokens >= 1):
        raise InvalidArgument("temperature must be 0 to 2, top_p 0 to 1, max_tokens at least 1")
    messages = (*((Message("system", system),) if system else ()), Message("user", prompt))
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    try:
        prepared = model.prepare(ChatJob(Conversation(messages), sampling, max_tokens_is_default=True))
    except PromptError as error:
        raise InvalidArgument(error.message) from None
    async with aclosing(model.complete(prepared)) as events:
        async for _, event in events:
            if isinstance(event, TextDelta) and event.text:
                yield event.text
