"""Models into memory and out of it, within a budget: on demand, the least recently used out first."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from serving.http.errors import APIError
from serving.openai import errors
from serving.registry import ModelRegistry, Running, ServedModel
from serving.settings import Settings
from serving.worker.model_source import MemoryPlan, ModelSource, StartedModel

RETRY_SECONDS = 30.0  # after which a model that could not be loaded is tried again

T = TypeVar("T")


class LoopClosed(BaseException):
    """The server has ended, and with it this thread."""


class ModelLoader:
    """Loads one model after the other in a thread of its own. Its public methods are for the event loop."""

    def __init__(
        self,
        registry: ModelRegistry,
        sources: Mapping[str, ModelSource],
        settings: Settings,
        worker: int,
        logger: logging.Logger,
    ) -> None:
        """sources: by the name of the model. worker: which of the service's processes this is, from 0."""
        self._registry, self._sources, self._settings = registry, sources, settings
        self._worker, self._logger = worker, logger
        self._jobs = SimpleQueue[Callable[[], None]]()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._plan: MemoryPlan | None = None  # the loading thread's; None for a single model, which takes what it needs
        self._turns: Any = None  # serving.engine.turns.DeviceTurns, where engines share the device
        registry.load = self.load
        if len(registry.models) > 1:
            registry.unload = self.unload

    def begin(self, loaded: Callable[[ServedModel], None], failed: Callable[[ServedModel], None]) -> None:
        """Start the thread and load what is preloaded. loaded, failed: called in the thread after each model."""
        self._loop = asyncio.get_running_loop()
        self._loaded, self._failed = loaded, failed
        self._jobs.put(self._make_plan)
        for model in self._registry.models:
            if model.is_preloaded:
                self.load(model)
        threading.Thread(target=self._run, name="loading", daemon=True).start()

    def load(self, model: ServedModel) -> None:
        """See ModelRegistry. After a failure a model is tried again only when a pause is over."""
        if model.error is not None and time.monotonic() - model.failed_at < RETRY_SECONDS:
            return
        model.progress, model.loading = 0.0, Future()
        self._jobs.put(lambda: self._load(model))

    async def unload(self, model: ServedModel) -> None:
        """See ModelRegistry. Raises APIError 409 while requests use the model."""
        if model.running is None:
            return
        if num_requests := model.running.use.num_requests + model.num_waiting:
            message = f"The model `{model.name}` has {num_requests} requests in flight."
            raise APIError(409, message, param="model", code="model_in_use")
        stopped = Future[None]()
        self._remove(model, stopped)
        await asyncio.wrap_future(stopped)

    def _remove(self, model: ServedModel, stopped: Future[None] | None = None) -> None:
        assert model.running is not None
        unused, model.running = [model.running], None  # no frame keeps the model alive: `_stop` empties the list
        self._jobs.put(lambda: self._stop([model.name], unused, stopped))

    def unload_idle(self) -> None:
        """Called every second."""
        limit = time.monotonic() - self._settings.idle_minutes * 60
        if not self._settings.idle_minutes or self._registry.unload is None:
            return
        for model in self._registry.models:
            if model.idle_since is not None and model.idle_since < limit:
                self._remove(model)

    # ---- the loading thread ----

    def _run(self) -> None:
        with suppress(LoopClosed):
            while True:
                self._jobs.get()()

    def _make_plan(self) -> None:
        if len(self._sources) == 1:
            return
        from serving.engine.turns import DeviceTurns
        from serving.worker.start_native import plan_memory  # imports torch, which the parent does not need

        self._turns = DeviceTurns()
        self._plan = plan_memory(self._sources, self._settings, self._worker)
        for model in self._registry.models:
            model.num_bytes = self._plan.of_model[model.name]
        total = self._plan.total / 2**30
        self._logger.info("%d models share %.1f GiB of memory", len(self._sources), total)

    def _load(self, model: ServedModel) -> None:
        try:
            names, unused = self._in_loop(lambda: self._take_unused(model))
            if unused:
                self._stop(names, unused)
            started = self._start(model)
        except APIError as error:
            refusal = error
            self._logger.warning("%s is not loaded: %s", model.name, refusal)
            self._in_loop(lambda: model.refuse_loading(refusal))
        except Exception as error:
            self._logger.exception("%s could not be loaded", self._sources[model.name].tag)
            text = " ".join(str(error).split()) or type(error).__name__
            self._in_loop(lambda: model.end_loading(None, text))
            self._failed(model)
        else:
            gc.collect()
            gc.freeze()  # a later full collection would hold the event loop while it visits all modules
            self._in_loop(lambda: self._end(model, started))
            self._loaded(model)

    def _start(self, model: ServedModel) -> StartedModel:
        source, settings = self._sources[model.name], self._sources[model.name].settings
        if settings.engine == "vllm" and source.open_format is not None:
            from serving.engine.vllm.start import start_on_vllm

            running = start_on_vllm(
                source.open_format, source.path, source.metadata, settings, self._logger, self._worker, model.name
            )
            return StartedModel(running, settings.precision, 0)
        from serving.worker import start_native

        if self._plan is not None and not settings.kv_cache_gib:
            settings = settings.model_copy(update={"kv_cache_gib": self._plan.kv_cache / 2**30})
        turns = None if self._turns is None else self._turns.of_engine()

        def report(done: float) -> None:
            model.progress = done

        start = start_native.start_model if "chat" in model.abilities else start_native.start_encoder
        return start(source, settings, self._logger, self._worker, model.name, turns, report)

    def _stop(self, names: list[str], unused: list[Running], stopped: Future[None] | None = None) -> None:
        """End engines and give their memory back. Empties `unused`."""
        from serving.engine.native.device import release_memory

        while unused:
            unused.pop().engine.stop()
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        release_memory()
        self._logger.info("unloaded: %s", ", ".join(names))
        if stopped is not None:
            stopped.set_result(None)

    def _in_loop(self, work: Callable[[], T]) -> T:
        """The result of `work`, called by the event loop. Raises what it raises, and LoopClosed."""
        assert self._loop is not None
        result = Future[T]()

        def run() -> None:
            try:
                result.set_result(work())
            except Exception as error:  # noqa: BLE001
                result.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(run)
        except RuntimeError:  # it is closed: the server has ended
            raise LoopClosed from None
        return result.result()

    # ---- the event loop, for the thread ----

    def _take_unused(self, model: ServedModel) -> tuple[list[str], list[Running]]:
        """Take unused models out of the registry until this one fits: (their names, them). Raises APIError."""
        if self._plan is None:
            return [], []
        needed, loaded = self._plan.of_model[model.name], [each for each in self._registry.models if each.running]
        if needed > self._plan.total:
            raise errors.no_memory_ever(model.name, needed, self._plan.total)
        free = self._plan.total - sum(each.num_bytes for each in loaded)
        idle = [each for each in loaded if each.idle_since is not None]
        idle.sort(key=lambda each: each.idle_since or 0.0)
        chosen: list[ServedModel] = []
        while free < needed and idle:
            chosen.append(idle.pop(0))
            free += chosen[-1].num_bytes
        if free < needed:
            raise errors.no_memory_now(model.name, needed, free)
        unused = [each.running for each in chosen if each.running is not None]
        for each in chosen:
            each.running = None
        return [each.name for each in chosen], unused

    def _end(self, model: ServedModel, started: StartedModel) -> None:
        model.precision, model.num_bytes = started.precision, started.num_bytes
        model.progress = 1.0
        model.end_loading(started.running, None)
