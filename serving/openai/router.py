"""The OpenAI surface as one Starlette application: the only code that knows endpoints. Composition, no rules."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from serving.admission.admission_control import Admission
from serving.generation import embedding
from serving.generation.interface import PromptError
from serving.generation.pipeline import ChatJob, CompletionJob, ContextOverflow, Prompt, RunningModel
from serving.http import server_sent_events as sse
from serving.http.disconnect import unless_disconnected
from serving.http.error_middleware import ErrorMiddleware
from serving.http.errors import APIError, error_response, invalid, method_not_allowed, unknown_url
from serving.http.json_body import parse_object, read_body
from serving.http.request_context import request_context
from serving.http.server_sent_events import to_json
from serving.openai import errors
from serving.openai.chat import convert
from serving.openai.chat.request import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from serving.openai.chat.response import ChatCompletionStream, ChunkOptions, Envelope, to_completion
from serving.openai.common import ApiLimits
from serving.openai.completions.response import CompletionStream, TextPlan, to_text_completion
from serving.openai.embeddings import EmbeddingRequest, check_dimensions, to_embedding_list
from serving.openai.responses.convert import in_own_words, to_chat_request
from serving.openai.responses.request import ResponsesRequest
from serving.openai.responses.response import ResponseStream, response_head, to_response
from serving.openai.start_generation import GenerationStarter
from serving.openai.streaming import Framing, begin_stream, collect
from serving.openai.validation import above_maximum, validate
from serving.registry import ModelRegistry

INLINE_BODY_BYTES = 256 * 1024  # larger bodies are parsed in a thread: the event loop has streams to feed
INLINE_PROMPT_CHARACTERS = 4096  # longer prompts are tokenized in a thread

BodyT = TypeVar("BodyT", bound=BaseModel)


def create_app(
    served: ModelRegistry,
    limits: ApiLimits | None = None,
    catch_all: bool = True,
    admission: Admission | None = None,
    more_routes: Sequence[Route] = (),
) -> Starlette:
    """The API without its prefix; `served` may be filled in later.

    catch_all: also answer unknown paths, in OpenAI's shape. False where other applications share the same root.
    admission: to be shared by all applications in front of one engine.
    """
    api = _Api(served, limits or ApiLimits(), admission or Admission())
    routes = [
        Route("/chat/completions", api.chat_completions, methods=["POST"]),
        Route("/chat/completions/input_tokens", api.input_tokens, methods=["POST"]),
        Route("/completions", api.completions, methods=["POST"]),
        Route("/responses", api.responses, methods=["POST"]),
        Route("/responses/input_tokens", api.response_input_tokens, methods=["POST"]),
        Route("/embeddings", api.embeddings, methods=["POST"]),
        Route("/models", api.list_models, methods=["GET"]),
        Route("/models/{name:path}", api.retrieve_model, methods=["GET"]),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
    ]
    routes += more_routes
    if catch_all:
        routes.append(Route("/{path:path}", _Unrouted(tuple(routes))))
    app = Starlette(
        routes=routes,
        middleware=[Middleware(ErrorMiddleware, to_api_error=errors.from_exception)],
        exception_handlers={HTTPException: _http_exception},
    )
    app.router.redirect_slashes = False
    app.state.served = served
    return app


class _Unrouted:
    """Any method on any path that no other route took."""

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = Request(scope).url.path
        for route in self._routes:
            if route.matches(scope)[0] == Match.PARTIAL:
                allowed = ", ".join(sorted(route.methods or ()))
                raise method_not_allowed(scope["method"], path, allowed)
        raise unknown_url(scope["method"], path)


async def _http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in OpenAI's shape."""
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if "Allow" in headers:
        failure = method_not_allowed(request.method, request.url.path, headers["Allow"])
    else:
        failure = unknown_url(request.method, request.url.path)
    request_context(request.scope).error_code = failure.code
    return error_response(failure)


class _Api:
    """The endpoints."""

    def __init__(self, served: ModelRegistry, limits: ApiLimits, admission: Admission) -> None:
        self._served = served
        self._limits = limits
        self._generations = GenerationStarter(admission, limits)

    async def chat_completions(self, request: Request) -> Response:
        body = await self._body(request, ChatRequest)
        model = self._model(body.model)
        if body.n > self._limits.max_n:
            raise above_maximum("n", self._limits.max_n, body.n)
        prompt = await _prepare(model, convert.to_chat_job(body))
        envelope = self._envelope("chatcmpl", body.model)
        options = _chunk_options(body, body.logprobs)
        token_bytes = model.chat_format.token_bytes
        feed = self._generations.open(request, model, [prompt])
        if body.stream:
            chunks = ChatCompletionStream(envelope, options, token_bytes, len(prompt.token_ids))
            return await begin_stream(feed, chunks, request, self._limits)
        events = await collect(feed, request)
        return _json(to_completion(events, envelope, options, token_bytes))

    async def completions(self, request: Request) -> Response:
        body = await self._body(request, CompletionRequest)
        model = self._model(body.model)
        jobs = convert.to_text_jobs(body, self._limits.max_n)
        prompts = [await _prepare(model, job) for job in jobs]
        plan = TextPlan(body.n, tuple(_echo(job, model) for job in jobs))
        envelope = self._envelope("cmpl", body.model)
        options = _chunk_options(body, body.logprobs is not None)
        token_bytes = model.chat_format.token_bytes
        num_answers = prompts[0].n  # of each prompt; more than n when the best are to be kept
        feed = self._generations.open(request, model, prompts)
        if body.stream:
            lengths = [len(prompt.token_ids) for prompt in prompts]
            chunks = CompletionStream(plan, envelope, options, token_bytes, lengths)
            return await begin_stream(feed, chunks, request, self._limits)
        per_prompt: list[list[tuple[int, Any]]] = [[] for _ in prompts]
        for index, event in await collect(feed, request):
            per_prompt[index // num_answers].append((index % num_answers, event))
        return _json(to_text_completion(per_prompt, plan, envelope, options, token_bytes))

    async def responses(self, request: Request) -> Response:
        body = await self._body(request, ResponsesRequest)
        chat = to_chat_request(body)
        model = self._model(body.model)
        try:
            prompt = await _prepare(model, convert.to_chat_job(chat))
        except (PromptError, APIError) as error:
            raise in_own_words(error) from None
        head = response_head(body, f"resp_{uuid.uuid4().hex}", int(time.time()))
        fold = ResponseStream(head, body.shows_logprobs, model.chat_format.token_bytes)
        feed = self._generations.open(request, model, [prompt])
        if body.stream:
            framing = Framing(sse.named_events, lambda failure: sse.named_events(fold.fail(failure)), b"")
            return await begin_stream(feed, fold, request, self._limits, framing)
        return _json(to_response(await collect(feed, request), fold))

    async def response_input_tokens(self, request: Request) -> Response:
        """How many tokens the prompt of a request to /responses has, without generating."""
        chat = to_chat_request(await self._body(request, ResponsesRequest))
        model = self._model(chat.model)
        try:
            token_ids = await asyncio.to_thread(model.render, convert.to_chat_job(chat).conversation)
        except PromptError as error:
            raise in_own_words(error) from None
        return _json({"object": "response.input_tokens", "input_tokens": len(token_ids)})

    async def embeddings(self, request: Request) -> Response:
        body = await self._body(request, EmbeddingRequest)
        model = self._model(body.model)
        check_dimensions(body, model.engine.shape.hidden_size)
        try:
            texts = await asyncio.to_thread(embedding.prepare, model, convert.to_prompts(body.input))
        except ContextOverflow as error:
            raise errors.context_overflow(error, is_default=True) from None
        num_tokens = sum(len(text.token_ids) for text in texts)
        async with self._generations.embedding(request, model, num_tokens):
            vectors = await unless_disconnected(request.receive, embedding.embed(model, texts))
        return _json(await asyncio.to_thread(to_embedding_list, vectors, body, num_tokens))

    async def input_tokens(self, request: Request) -> Response:
        """How many tokens a chat request's prompt has, without generating; the body is that of a chat request."""
        body = await self._body(request, ChatRequest)
        model = self._model(body.model)
        token_ids = await asyncio.to_thread(model.render, convert.to_chat_job(body).conversation)
        return _json({"object": "response.input_tokens", "input_tokens": len(token_ids)})

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request, TokenizeRequest)
        model = self._model(body.model)
        conversation = convert.to_tokenize_conversation(body)
        if conversation is None:
            token_ids = await asyncio.to_thread(model.chat_format.encode, body.prompt or "")
        else:
            token_ids = await asyncio.to_thread(model.render, conversation)
        token_bytes = model.chat_format.token_bytes
        texts = [token_bytes(token_id).decode("utf-8", "replace") for token_id in token_ids]
        return _json(
            {
                "count": len(token_ids),
                "max_model_len": model.context_length,
                "tokens": token_ids,
                "token_strs": texts if body.return_token_strs else None,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, DetokenizeRequest)
        chat_format = self._model(body.model).chat_format
        for index, token_id in enumerate(body.tokens):
            if token_id >= chat_format.num_tokens:
                raise invalid(f"This model has no token {token_id}.", f"tokens[{index}]")
        return _json({"prompt": await asyncio.to_thread(chat_format.decode, body.tokens)})

    async def list_models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model_card(name) for name in self._served.names]})

    async def retrieve_model(self, request: Request) -> Response:
        name: str = request.path_params["name"]
        if not self._served.answers_to(name):
            raise errors.model_not_found(name)
        return _json(self._model_card(name))

    def _model_card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._served.created, "owned_by": "library"}

    def _model(self, name: str) -> RunningModel:
        """The loaded model. Raises APIError 404 for a name that is not served, 503 while there is no model."""
        if not self._served.answers_to(name):
            raise errors.model_not_found(name)
        if self._served.model is not None:
            return self._served.model
        raise errors.model_loading() if self._served.error is None else errors.model_load_failed()

    async def _body(self, request: Request, model: type[BodyT]) -> BodyT:
        raw = await read_body(request, self._limits.max_body_bytes)
        if len(raw) > INLINE_BODY_BYTES:
            return await asyncio.to_thread(_parse, raw, model, self._limits.max_json_depth)
        return _parse(raw, model, self._limits.max_json_depth)

    def _envelope(self, prefix: str, model: str) -> Envelope:
        return Envelope(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, self._served.fingerprint)


def _parse(raw: bytes, model: type[BodyT], max_depth: int) -> BodyT:
    return validate(model, parse_object(raw, max_depth))


async def _prepare(model: RunningModel, job: ChatJob | CompletionJob) -> Prompt:
    """Tokenize, compile and refuse; in a thread when that takes long. Raises PromptError, APIError for an overflow."""
    try:
        if _num_characters(job) > INLINE_PROMPT_CHARACTERS or (isinstance(job, ChatJob) and job.needs_grammar):
            return await asyncio.to_thread(model.prepare, job)
        return model.prepare(job)
    except ContextOverflow as error:
        raise errors.context_overflow(error, job.max_tokens_is_default) from None


def _num_characters(job: ChatJob | CompletionJob) -> int:
    if isinstance(job, CompletionJob):
        return len(job.prompt)
    return sum(len(message.content) for message in job.conversation.messages)


def _echo(job: CompletionJob, model: RunningModel) -> str:
    if not job.echo:
        return ""
    return job.prompt if isinstance(job.prompt, str) else model.chat_format.decode(job.prompt)


def _chunk_options(body: GenerationRequest, logprobs: bool) -> ChunkOptions:
    stream = body.stream_options
    return ChunkOptions(
        logprobs=logprobs,
        include_usage=stream is not None and stream.include_usage,
        continuous_usage=stream is not None and stream.continuous_usage_stats,
        has_legacy_functions=isinstance(body, ChatRequest) and bool(body.functions),
    )


def _json(value: dict[str, Any]) -> Response:
    return Response(to_json(value), media_type="application/json")
