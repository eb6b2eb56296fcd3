"""Several tiny models in one store, behind one application with the loader that the service has."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
from starlette.applications import Starlette

from models.store.model_store import import_model, servable
from models.store.progress import no_progress
from serving.openai.limits import ApiLimits
from serving.openai.router import create_app
from serving.registry import ModelRegistry
from serving.settings import Settings
from serving.worker.model_loader import ModelLoader
from serving.worker.model_source import ModelSource, build_registry
from serving.worker.runtime import stop_all
from tests.families import FAMILIES
from tests.own_store import own_store
from tests.sources import source_of

LOGGER = logging.getLogger("tests")
CACHE = 45 / 1024  # GiB


@dataclass(frozen=True)
class Several:
    """A running application and its models."""

    http: httpx2.AsyncClient
    app: Starlette
    registry: ModelRegistry
    loader: ModelLoader

    async def chat(self, model: str, **more: Any) -> httpx2.Response:
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": model, "messages": messages, "max_tokens": 4, "seed": 1, "ignore_eos": True, **more}
        return await self.http.post("/chat/completions", json=body, timeout=60)

    def states(self) -> dict[str, str]:
        return {model.name: model.state for model in self.registry.models}


def store_models(home: Path, encoders: Mapping[str, tuple[str, Path]] | None = None) -> dict[str, ModelSource]:
    """`one`, `two` and `three` generate; encoders: name -> (family, checkpoint folder)."""
    written = FAMILIES["chatglm2"](home / "checkpoint")
    settings = Settings(device="cpu", threads=1, kv_cache_gib=CACHE, max_sequences=4)
    imported = dict.fromkeys(("one", "two", "three"), (written.family, written.folder)) | dict(encoders or {})
    with own_store(home / "bentoml"):
        for name, (family, folder) in imported.items():
            import_model(family, folder, f"{name}:1", {}, no_progress)
        return {name: source_of(servable(f"{name}:1"), settings) for name in imported}


@asynccontextmanager
async def several_models(
    sources: Mapping[str, ModelSource],
    memory: float = 1.0,
    load: Callable[..., Any] | None = None,
    limits: ApiLimits | None = None,
    **settings: Any,
) -> AsyncIterator[Several]:
    """memory: GiB. load: in front of each model's own, with its name."""
    chosen = Settings(device="cpu", models=",".join(sources), memory_gib=memory, **settings)
    if load is not None:
        sources = {name: replace(source, load=_with(load, name, source.load)) for name, source in sources.items()}
    registry = build_registry(chosen.served_models(list), sources, accept_any=False)
    loader = ModelLoader(registry, sources, chosen, 0, LOGGER)
    app = create_app(registry, limits)
    loader.begin(loaded=lambda model: None, failed=lambda model: None)
    try:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as http:
            yield Several(http, app, registry, loader)
    finally:
        # a thread that still loads would load beside the next test's models
        if loading := [asyncio.wrap_future(model.loading) for model in registry.models if model.loading]:
            await asyncio.wait(loading, timeout=10)
        stop_all(registry)


def _with(before: Callable[[str], None], name: str, load: Callable[..., Any]) -> Callable[..., Any]:
    def loading(*arguments: Any) -> Any:
        before(name)
        return load(*arguments)

    return loading
