"""The Bento: settings -> stored model -> registry and worker runtime -> HTTP application. Composition only."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing

import bentoml
from bentoml.models import BentoModel
from starlette.middleware.cors import CORSMiddleware

from models.families import FAMILIES
from models.store.model_store import StoreError, ensure_demo, servable
from serving.http.access_middleware import AccessMiddleware, RouteNames
from serving.http.json_body import BodyLimits, BodyMiddleware
from serving.http.pages import page_routes
from serving.openai.limits import ApiLimits
from serving.openai.router import create_app
from serving.openai.start_generation import GenerationStarter
from serving.registry import ModelRegistry
from serving.settings import BuildArguments, Settings, SettingsError
from serving.shared_folder import end_server
from serving.worker.bentoml_adapter import (
    LOGGER,
    BentoMLService,
    complete_log,
    container_image,
    forward_second_signal,
    gpu_resources,
    requested_address,
    worker_number,
)
from serving.worker.bentoml_generate import GenerateRequest, generate_response
from serving.worker.graceful_shutdown import ABORT_SECONDS
from serving.worker.listening import PortTaken, check_port, default_host, listening_addresses, ready_lines
from serving.worker.runtime import CORS_HEADERS, build_runtime

PORT = 8000
logger = logging.getLogger(LOGGER)
built = bentoml.use_arguments(BuildArguments)

try:
    settings = Settings.from_environment({**built.environment, **os.environ})
    stored = servable(ensure_demo() if settings.model == "chatglm2-demo" else settings.model)
    family = FAMILIES[stored.family]
    settings.check_stored_model(stored.tag, stored.family, stored.metadata, family.open_format is not None)
    name, _, version = stored.tag.partition(":")
    registry = ModelRegistry(
        name=name,
        aliases=settings.aliases,
        accept_any=settings.accept_any_model,
        created=int(time.time()),
        fingerprint=f"fp_{version[:12]}",
    )
    runtime = build_runtime(settings, registry, logger)
except (SettingsError, StoreError) as error:
    print(f"chatglm: {error}", file=sys.stderr)
    raise SystemExit(1) from None

has_keys = bool(settings.api_keys or settings.api_keys_file)
host = default_host(has_keys, os.environ)
limits = ApiLimits(
    BodyLimits(max_bytes=int(settings.max_body_mib * 2**20)),
    ignores_unknown=settings.unknown_fields == "ignore",
    max_n=settings.max_n,
    ping_seconds=settings.ping_seconds,
    stall_seconds=settings.stall_seconds,
    timeout_seconds=settings.request_timeout,
)
generations = GenerationStarter(runtime.admission, limits)
at_v1 = create_app(registry, limits, admission=runtime.admission)
at_root = create_app(
    registry,
    limits,
    catch_all=False,
    admission=runtime.admission,
    more_routes=[runtime.metrics_route, *page_routes(settings.chat_page)],
)


@bentoml.service(
    name="chatglm2",
    service_class=BentoMLService,
    http={"port": PORT, "host": host},
    image=container_image(built),
    resources=gpu_resources(settings.workers * settings.gpus_per_worker, settings.gpu_type),
    workers=settings.workers,
    # for proxies and autoscalers that read it; BentoMLService does not apply it
    traffic={"timeout": 86400, "concurrency": settings.workers * settings.max_sequences},
    envs=[{"name": "BENTOML_DO_NOT_TRACK", "value": "true"}],
    tracing={"excluded_urls": "."},  # BentoML's spans cost more than a token each; worker/tracing.py has one a request
    metrics={"enabled": False},  # BentoML's have the raw path as a label; /metrics is our own route
    logging={"access": {"enabled": False}},  # ours has tokens and the names of API keys
)
@bentoml.asgi_app(at_root, path="/")
@bentoml.asgi_app(at_v1, path="/v1")
class ChatGLM2:
    """ChatGLM2 and its relatives behind OpenAI's chat completion API."""

    model = BentoModel(stored.tag) if built.bundle else stored.tag

    def __init__(self) -> None:
        self._running = AsyncExitStack()
        # in a thread: meanwhile the server answers /livez, and /readyz with 503
        threading.Thread(target=self._load, name="loading", daemon=True).start()

    def _load(self) -> None:
        worker = worker_number()
        try:
            if settings.engine == "vllm" and family.open_format is not None:
                from serving.engine.vllm.start import start_on_vllm

                model = start_on_vllm(family.open_format, stored.path, stored.metadata, settings, logger, worker)
            else:
                from serving.worker.start_native import start_model  # imports torch, which the parent does not need

                model = start_model(family.load, stored.path, stored.metadata, settings, logger, worker)
            gc.collect()
            gc.freeze()  # a later full collection would hold the event loop while it visits all modules
            registry.model = model
            for line in ready_lines(stored.tag, listening_addresses(), has_keys, settings.chat_page):
                logger.info(line)
        except Exception as error:
            logger.exception("%s could not be loaded", stored.tag)
            registry.error = str(error)
            if settings.exit_on_failed_load:
                end_server()

    @bentoml.on_deployment
    def in_parent_process() -> None:
        try:
            check_port(*requested_address(host, PORT))
        except PortTaken as error:
            print(f"chatglm: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        forward_second_signal()

    @bentoml.on_startup
    async def begin(self) -> None:
        complete_log()
        await self._running.enter_async_context(runtime.running())

    async def __is_ready__(self) -> bool:
        return runtime.monitor.is_ready

    async def __is_alive__(self) -> bool:
        return runtime.monitor.is_alive

    @bentoml.api
    async def generate(
        self,
        ctx: bentoml.Context,
        prompt: str,
        system: str = "",
        temperature: float = 0.95,
        top_p: float = 0.7,
        max_tokens: int = 2048,
    ) -> AsyncGenerator[str, None]:
        """Answer one question as a stream of text, for BentoML's own clients."""
        body = GenerateRequest(prompt, system, temperature, top_p, max_tokens)
        async with aclosing(generate_response(generations, ctx, registry, body)) as texts:
            async for text in texts:
                yield text

    @bentoml.on_shutdown
    async def end(self) -> None:
        await self._running.aclose()
        if registry.model is not None:
            await asyncio.to_thread(registry.model.engine.stop, ABORT_SECONDS)


if settings.cors_origins:
    ChatGLM2.add_asgi_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        allow_private_network=True,  # a page of an allowed origin may call a server on its user's own network
        expose_headers=CORS_HEADERS,
    )
route_names = RouteNames([*at_v1.routes, *at_root.routes])
ChatGLM2.add_asgi_middleware(AccessMiddleware, policy=runtime.policy, route_names=route_names)
ChatGLM2.add_asgi_middleware(BodyMiddleware, limits=limits.body)
