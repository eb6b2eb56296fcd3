"""Model names -> the models behind them: what each can do, whether it is in memory, and how to get it there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from serving.generation.encoder import RunningEncoder
from serving.generation.pipeline import RunningModel

Ability = Literal["chat", "embeddings", "rerank"]
State = Literal["available", "loading", "loaded", "failed"]
Running = RunningModel | RunningEncoder

GENERATES: frozenset[Ability] = frozenset(("chat", "embeddings"))


@dataclass(eq=False)
class ServedModel:
    """One model under all its names. Its state is changed by the event loop only, but for `progress`."""

    name: str
    aliases: tuple[str, ...] = ()
    created: int = 0  # Unix seconds
    fingerprint: str = "fp_chatglm"
    family: str = ""
    abilities: frozenset[Ability] = GENERATES
    is_preloaded: bool = True  # at the server's start; else when it is first asked for
    precision: str = ""  # once it is loaded; before, what its setting says
    num_bytes: int = 0  # memory of weights and caches; an estimate until it is loaded
    running: Running | None = None
    was_loaded: bool = field(init=False)
    error: str | None = None  # why loading failed: for the log, never for a client
    failed_at: float = 0.0  # time.monotonic()
    progress: float = 0.0  # of loading, 0 to 1; written by the loading thread
    loading: Future[None] | None = field(default=None, repr=False)
    num_waiting: int = 0  # requests that wait for it, or have just got it

    def __post_init__(self) -> None:
        self.was_loaded = self.running is not None

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that it answers to, the true one first, none twice."""
        return tuple(dict.fromkeys((self.name, *self.aliases)))

    @property
    def idle_since(self) -> float | None:
        """time.monotonic() of its last request's end; None if it is not loaded, or a request uses it or is about to."""
        if self.running is None or self.running.use.num_requests or self.num_waiting:
            return None
        return self.running.use.last_ended

    @property
    def state(self) -> State:
        if self.running is not None:
            return "loaded"
        if self.loading is not None:
            return "loading"
        return "available" if self.error is None else "failed"

    def end_loading(self, running: Running | None, error: str | None) -> None:
        """One of the two is given. Those who wait go on after it."""
        self.running, self.error, self.failed_at = running, error, time.monotonic()
        self.was_loaded = self.was_loaded or running is not None
        waiting, self.loading = self.loading, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def refuse_loading(self, refusal: Exception) -> None:
        """It may not be loaded now: those who wait get this, and the next request asks again."""
        waiting, self.loading = self.loading, None
        if waiting is not None and not waiting.done():
            waiting.set_exception(refusal)


@dataclass(eq=False)
class ModelRegistry:
    """The models of this process. The first is the default, for requests that name none.

    load: begins to load a model that is not in memory, and sets its `loading`.
    unload: removes one that is not in use; raises APIError. None where models stay as they are.
    """

    models: Sequence[ServedModel]
    accept_any: bool = False  # unknown names mean the default model
    load: Callable[[ServedModel], None] | None = None
    unload: Callable[[ServedModel], Awaitable[None]] | None = None

    @property
    def default(self) -> ServedModel:
        return self.models[0]

    @property
    def all_loaded(self) -> bool:
        return all(model.running is not None for model in self.models)

    def find(self, name: str) -> ServedModel | None:
        """The model of this name; a model's own name goes before the aliases of others."""
        for model in self.models:
            if model.name == name:
                return model
        for model in self.models:
            if name in model.aliases:
                return model
        return self.default if self.accept_any else None

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is listed, none twice."""
        return tuple(dict.fromkeys(name for model in self.models for name in model.names))

    async def load_until(self, model: ServedModel, seconds: float) -> None:
        """Have a model in memory, or wait for as long as `seconds`. Raises APIError if there is no memory for it."""
        if model.running is None and model.loading is None and self.load is not None:
            self.load(model)
        if model.loading is not None:
            waiting = asyncio.wrap_future(model.loading)
            await asyncio.wait({waiting}, timeout=seconds)
            if waiting.done():
                waiting.result()
