"""The Bento's entry: store -> load -> engine -> API. Composition only; nobody imports this file but BentoML."""

from __future__ import annotations

import asyncio
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
from serving.http.access_middleware import AccessMiddleware
from serving.http.pages import page_routes
from serving.openai.limits import ApiLimits
from serving.openai.router import create_app
from serving.openai.start_generation import GenerationStarter
from serving.registry import ModelRegistry
from serving.settings import Settings, SettingsError
from serving.worker.bentoml_adapter import BentoMLService
from serving.worker.bentoml_generate import GenerateRequest, ask
from serving.worker.container_image import BuildArguments, container_image
from serving.worker.runtime import CORS_HEADERS, CUT_SECONDS, pass_on_second_signal, prepare

logger = logging.getLogger("bentoml.chatglm")  # under BentoML's logger, so that its handler prints it

built = bentoml.use_arguments(BuildArguments)

try:
    settings = Settings.from_environment({**built.environment, **os.environ})
    stored = servable(ensure_demo() if settings.model == "chatglm2-demo" else settings.model)
    family = FAMILIES[stored.family]
    if settings.engine == "vllm" and family.open_format is None:
        raise SettingsError(f"vLLM does not have the network of the family {stored.family}: use CHATGLM_ENGINE=native")
    kept_in = stored.metadata.get("quantized")
    if kept_in and (settings.engine == "vllm" or settings.precision not in ("auto", kept_in)):
        wanted = "CHATGLM_ENGINE=vllm" if settings.engine == "vllm" else f"CHATGLM_PRECISION={settings.precision}"
        raise SettingsError(f"{stored.tag} is stored in {kept_in}, not for {wanted}: serve {stored.metadata['source']}")
    name, _, version = stored.tag.partition(":")
    served = ModelRegistry(
        name=name,
        aliases=settings.alias_names,
        accept_any=settings.accept_any_model,
        created=int(time.time()),
        fingerprint=f"fp_{version[:12]}",
    )
    operations = prepare(settings, served, logger)
except (SettingsError, StoreError) as error:
    print(f"chatglm: {error}", file=sys.stderr)
    raise SystemExit(1) from None

limits = ApiLimits(
    max_body_bytes=int(settings.max_body_mib * 2**20),
    max_n=settings.max_n,
    ping_seconds=settings.ping_seconds,
    stall_seconds=settings.stall_seconds,
    timeout_seconds=settings.request_timeout,
)
generations = GenerationStarter(operations.admission, limits)
at_v1 = create_app(served, limits, admission=operations.admission)
at_root = create_app(
    served,
    limits,
    catch_all=False,
    admission=operations.admission,
    more_routes=[operations.metrics_route, *page_routes(settings.chat_page)],
)


@bentoml.service(
    name="chatglm2",
    service_class=BentoMLService,
    http={"port": 8000},
    image=container_image(built),
    resources={"gpu": settings.workers * settings.gpus_per_worker},
    workers=settings.workers,
    traffic={"timeout": 86400},  # read by others than this server; BentoMLService takes the limit out
    tracing={"excluded_urls": "."},  # a span for every token costs more than the token; serving/tracing.py has ours
    metrics={"enabled": False},  # a series for every path that anybody asks for; /metrics is our own route
    logging={"access": {"enabled": False}},  # ours knows tokens and keys
)
@bentoml.asgi_app(at_root, path="/")
@bentoml.asgi_app(at_v1, path="/v1")
class ChatGLM2:
    """ChatGLM2 and its relatives behind OpenAI's chat completion API."""

    model = BentoModel(stored.tag) if built.bundle else stored.tag

    def __init__(self) -> None:
        self._running = AsyncExitStack()
        # in the background: the server answers /livez and says "not ready" while gigabytes are read
        threading.Thread(target=self._load, name="loading", daemon=True).start()

    def _load(self) -> None:
        worker = (bentoml.server_context.worker_index or 1) - 1  # BentoML counts from 1
        try:
            if settings.engine == "vllm" and family.open_format is not None:
                from serving.engine.vllm.start import start_on_vllm

                served.model = start_on_vllm(family.open_format, stored.path, stored.metadata, settings, logger, worker)
            else:
                from serving.worker.start_native import (
                    start_model,  # imports torch, which the parent process never needs
                )

                served.model = start_model(family.load, stored.path, stored.metadata, settings, logger, worker)
            logger.info("%s is ready at http://localhost:8000/v1", stored.tag)
        except Exception as error:
            logger.exception("%s could not be loaded", stored.tag)
            served.error = str(error)

    @bentoml.on_deployment
    def watch_signals() -> None:
        pass_on_second_signal()

    @bentoml.on_startup
    async def begin(self) -> None:
        await self._running.enter_async_context(operations.running())

    async def __is_ready__(self) -> bool:
        return operations.monitor.is_ready

    async def __is_alive__(self) -> bool:
        return operations.monitor.is_alive

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
        question = GenerateRequest(prompt, system, temperature, top_p, max_tokens)
        async with aclosing(ask(generations, ctx.request, served.model, question)) as texts:
            async for text in texts:
                yield text

    @bentoml.on_shutdown
    async def end(self) -> None:
        await self._running.aclose()
        if served.model is not None:
            await asyncio.to_thread(served.model.engine.stop, CUT_SECONDS)


if settings.cors_origin_list:
    ChatGLM2.add_asgi_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origin_list,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=CORS_HEADERS,
    )
ChatGLM2.add_asgi_middleware(AccessMiddleware, guard=operations.guard([at_v1, at_root]))
