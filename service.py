"""The Bento's entry: store -> load -> engine -> API. Composition only; nobody imports this file but BentoML."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import bentoml
from bentoml.models import BentoModel

from models import FAMILIES
from models.store import StoreError, ensure_demo, servable
from serving.api.app import create_app
from serving.api.native import ask
from serving.api.openapi import DescribedService
from serving.api.served import ApiLimits, Served
from serving.settings import Settings, SettingsError

logger = logging.getLogger("bentoml.chatglm")  # under BentoML's logger, so that its handler prints it

try:
    settings = Settings.from_environment(os.environ)
    stored = servable(ensure_demo() if settings.model == "chatglm2-demo" else settings.model)
except (SettingsError, StoreError) as error:
    print(f"chatglm: {error}", file=sys.stderr)
    raise SystemExit(1) from None

name, _, version = stored.tag.partition(":")
served = Served(
    name=name,
    aliases=settings.alias_names,
    accept_any=settings.accept_any_model,
    created=int(time.time()),
    fingerprint=f"fp_{version[:12]}",
)
limits = ApiLimits(
    max_body_bytes=int(settings.max_body_mib * 2**20), max_n=settings.max_n, ping_seconds=settings.ping_seconds
)


@bentoml.service(
    name="chatglm2",
    service_class=DescribedService,
    http={"port": 8000},
    resources={"gpu": 1},
    workers=1,
    traffic={"timeout": 86400},  # limits live inside the app, where errors have OpenAI's shape
    tracing={"excluded_urls": "chat/completions,completions"},  # a span for every token costs more than the token
)
@bentoml.asgi_app(create_app(served, limits, catch_all=False), path="/")
@bentoml.asgi_app(create_app(served, limits), path="/v1")
class ChatGLM2:
    """ChatGLM2 and its relatives behind OpenAI's chat completion API."""

    model = BentoModel(stored.tag)

    def __init__(self) -> None:
        # in the background: the server answers /livez and says "not ready" while gigabytes are read
        threading.Thread(target=self._load, name="loading", daemon=True).start()

    def _load(self) -> None:
        from serving.start import start_model  # imports torch, which the parent process never needs

        try:
            served.model = start_model(FAMILIES[stored.family].load, stored.path, stored.metadata, settings, logger)
            logger.info("%s is ready at http://localhost:8000/v1", stored.tag)
        except Exception as error:
            logger.exception("%s could not be loaded", stored.tag)
            served.error = str(error)

    async def __is_ready__(self) -> bool:
        return served.model is not None and served.model.engine.is_alive

    @bentoml.api
    async def generate(
        self, prompt: str, system: str = "", temperature: float = 0.95, top_p: float = 0.7, max_tokens: int = 2048
    ) -> AsyncGenerator[str, None]:
        """Answer one question as a stream of text, for BentoML's own clients."""
        async with aclosing(ask(served.model, prompt, system, temperature, top_p, max_tokens)) as texts:
            async for text in texts:
                yield text

    @bentoml.on_shutdown
    def stop(self) -> None:
        if served.model is not None:
            served.model.engine.stop()
