"""One question, one stream of text: what BentoML's own clients call. The same pipeline as the OpenAI routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from http import HTTPStatus

from bentoml.exceptions import BentoMLException, InvalidArgument, ServiceUnavailable
from starlette.requests import Request

from serving.engine.interface import SamplingParams
from serving.generation.event_stream import EventStream
from serving.generation.interface import Conversation, Message, PromptError, TextDelta
from serving.generation.pipeline import ChatJob, Prompt, RunningModel
from serving.http.errors import APIError
from serving.openai.start_generation import GenerationStarter


@dataclass(frozen=True)
class GenerateRequest:
    """What BentoML's clients may say."""

    prompt: str
    system: str
    temperature: float
    top_p: float
    max_tokens: int  # at most; fewer if the context has no room for so many


async def ask(
    generations: GenerationStarter, request: Request, model: RunningModel | None, question: GenerateRequest
) -> AsyncGenerator[str, None]:
    """The answer's text as it comes. Raises BentoML's exceptions: InvalidArgument for what cannot be asked."""
    if model is None:
        raise ServiceUnavailable("the model is still loading")
    feed = _open(generations, request, model, _prepare(model, question))
    try:
        while (events := await feed.take()) is not None:
            text = "".join(event.text for _, event in events if isinstance(event, TextDelta))
            if text:
                yield text
    finally:
        await feed.close()


def _prepare(model: RunningModel, question: GenerateRequest) -> Prompt:
    if not (0 <= question.temperature <= 2 and 0 <= question.top_p <= 1 and question.max_tokens >= 1):
        raise InvalidArgument("temperature must be 0 to 2, top_p 0 to 1, max_tokens at least 1")
    system = (Message("system", question.system),) if question.system else ()
    conversation = Conversation((*system, Message("user", question.prompt)))
    sampling = SamplingParams(max_tokens=question.max_tokens, temperature=question.temperature, top_p=question.top_p)
    try:
        return model.prepare(ChatJob(conversation, sampling, max_tokens_is_default=True))
    except PromptError as error:
        raise InvalidArgument(error.message) from None


def _open(generations: GenerationStarter, request: Request, model: RunningModel, prompt: Prompt) -> EventStream:
    try:
        return generations.open(request, model, [prompt])
    except APIError as error:
        refusal = BentoMLException(error.message)
        refusal.error_code = HTTPStatus(error.status)
        raise refusal from None
