"""One prompt of BentoML's own clients -> its answer as a stream of text, through the pipeline of the OpenAI routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from http import HTTPStatus

from bentoml.exceptions import BentoMLException, InvalidArgument, ServiceUnavailable
from starlette.requests import Request

from serving.engine.interface import SamplingParams
from serving.generation.event_stream import EventStream
from serving.generation.interface import Conversation, Message, PromptError, TextDelta
from serving.generation.pipeline import ChatJob, RunningModel
from serving.http.errors import APIError
from serving.openai.start_generation import GenerationStarter


@dataclass(frozen=True)
class GenerateRequest:
    """The parameters of `/generate`."""

    prompt: str
    system: str
    temperature: float
    top_p: float
    max_tokens: int  # at most; fewer if the context ends before


async def generate_text(
    generations: GenerationStarter, request: Request, model: RunningModel | None, body: GenerateRequest
) -> AsyncGenerator[str, None]:
    """The text of the answer, piece by piece. Raises BentoML's exceptions: InvalidArgument for invalid parameters."""
    if model is None:
        raise ServiceUnavailable("the model is still loading")
    stream = _start(generations, request, model, body)
    try:
        while (events := await stream.take()) is not None:
            text = "".join(event.text for _, event in events if isinstance(event, TextDelta))
            if text:
                yield text
    finally:
        stream.close()


def _start(generations: GenerationStarter, request: Request, model: RunningModel, body: GenerateRequest) -> EventStream:
    if not (0 <= body.temperature <= 2 and 0 <= body.top_p <= 1 and body.max_tokens >= 1):
        raise InvalidArgument("temperature must be 0 to 2, top_p 0 to 1, max_tokens at least 1")
    system = (Message("system", body.system),) if body.system else ()
    conversation = Conversation((*system, Message("user", body.prompt)))
    sampling = SamplingParams(max_tokens=body.max_tokens, temperature=body.temperature, top_p=body.top_p)
    try:
        prompt = model.build_prompt(ChatJob(conversation, sampling, max_tokens_is_default=True))
        return generations.open(request, model, [prompt])
    except PromptError as error:
        raise InvalidArgument(error.message) from None
    except APIError as error:
        refusal = BentoMLException(error.message)
        refusal.error_code = HTTPStatus(error.status)
        raise refusal from None
