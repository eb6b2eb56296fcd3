"""The Bento: settings -> stored model -> registry and worker runtime -> HTTP application. Composition only."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing

import bentoml
from bentoml.models import BentoModel
from starlette.middleware.cors import CORSMiddleware

from models.families import FAMILIES
from models.store.model_store import DEMO_NAME, StoreError, ensure_demo, servable, stored_models
from serving.http.access_middleware import AccessMiddleware, RouteNames
from serving.http.json_body import BodyLimits, BodyMiddleware
from serving.http.pages import page_routes
from serving.openai.limits import ApiLimits
from serving.openai.router import create_app
from serving.openai.start_generation import GenerationStarter
from serving.registry import ServedModel
from serving.settings import BuildArguments, ModelSettings, Settings, SettingsError
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
from serving.worker.listening import PortTaken, check_port, default_host, listening_addresses, ready_lines
from serving.worker.model_loader import ModelLoader
from serving.worker.model_source import ModelSource, build_registry
from serving.worker.runtime import CORS_HEADERS, build_runtime, stop_all

PORT = 8000
logger = logging.getLogger(LOGGER)
built = bentoml.use_arguments(BuildArguments)


def find(chosen: ModelSettings) -> ModelSource:
    """A model of the settings in the store. Raises StoreError, SettingsError."""
    stored = servable(ensure_demo() if chosen.model == DEMO_NAME else chosen.model)
    family, own = FAMILIES[stored.family], settings.of(chosen)
    own.check_stored_model(stored.tag, stored.family, stored.metadata, family.open_format is not None)
    return ModelSource(
        stored.tag, stored.path, stored.family, stored.metadata, family.abilities, family.load, family.open_format, own
    )


def servable_names() -> list[str]:
    """For CHATGLM_MODELS=*, the demonstration last."""
    names = {model.tag.partition(":")[0] for model in stored_models() if not model.metadata.get("weights_only")}
    return [*sorted(names - {DEMO_NAME}), DEMO_NAME]


try:
    settings = Settings.from_environment(built.complete(os.environ))
    chosen = settings.served_models(servable_names)
    sources = {each.served_name: find(each) for each in chosen}
    registry = build_registry(chosen, sources, accept_any=settings.accept_any_model)
    runtime = build_runtime(settings, registry, logger)
except (SettingsError, StoreError) as error:
    print(f"chatglm: {error}", file=sys.stderr)
    raise SystemExit(1) from None

default = sources[registry.default.name]
has_keys = bool(settings.api_keys or settings.api_keys_file)
host = default_host(has_keys, os.environ)
limits = ApiLimits(
    BodyLimits(max_bytes=int(settings.max_body_mib * 2**20)),
    ignores_unknown=settings.unknown_fields == "ignore",
    max_n=settings.max_n,
    ping_seconds=settings.ping_seconds,
    load_seconds=settings.load_seconds,
    stall_seconds=settings.stall_seconds,
    timeout_seconds=settings.request_timeout,
)
generations = GenerationStarter(registry, runtime.admission, limits)
at_v1 = create_app(registry, limits, admission=runtime.admission)
at_root = create_app(
    registry,
    limits,
    catch_all=False,
    admission=runtime.admission,
    more_routes=[*runtime.routes, *page_routes(settings.chat_page)],
)


def say_ready(served: ServedModel) -> None:
    """Log where the server answers once a model is there."""
    if served is registry.default:
        for line in ready_lines(default.tag, listening_addresses(), has_keys, settings.chat_page):
            logger.info(line)


def give_up(served: ServedModel) -> None:
    """End a server without its only model, where an orchestrator waits for that."""
    if settings.exit_on_failed_load and len(registry.models) == 1:
        end_server()


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

    model = BentoModel(default.tag) if built.bundle else default.tag
    if built.bundle:  # BentoML takes the attributes of this type into the Bento
        locals().update({f"model_{i}": BentoModel(each.tag) for i, each in enumerate(sources.values()) if i})

    def __init__(self) -> None:
        self._running = AsyncExitStack()
        self._loader = ModelLoader(registry, sources, settings, worker_number(), logger)

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
        await self._running.enter_async_context(runtime.running(self._loader.unload_idle))
        # in a thread: meanwhile the server answers /livez, and /readyz with 503
        self._loader.begin(loaded=say_ready, failed=give_up)

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
        await asyncio.to_thread(stop_all, registry)


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
