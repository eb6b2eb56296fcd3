"""Engine state, once a second -> liveness, readiness and metrics; GET /metrics -> their text."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from serving import metrics
from serving.admission.admission_control import Admission
from serving.engine.interface import EngineStats, MonitoredEngine
from serving.http.access_middleware import ServerState
from serving.registry import ModelRegistry

TICK_SECONDS = 1.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

logger = logging.getLogger(__name__)


class EngineWatch:
    """The progress of one engine, and what it has done since the counters were raised last. For one event loop."""

    def __init__(self, name: str, engine: MonitoredEngine, max_ticks: int) -> None:
        self.name, self.engine, self._max_ticks = name, engine, max_ticks
        self._num_ticks = 0  # without progress; counted, not timed: a process that was stopped has not hung
        self._num_steps = -1
        self._counted = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0)  # what the counters contain so far

    @property
    def is_hung(self) -> bool:
        return self._num_ticks >= self._limit

    @property
    def _limit(self) -> int:
        """Ticks without progress; more for a step of more rows than a step has by its setting."""
        return math.ceil(self._max_ticks * max(1.0, self.engine.step_size))

    def tick(self) -> None:
        """Check the engine's progress; at the limit, have it fail its requests."""
        engine = self.engine
        if not engine.is_busy or engine.num_steps != self._num_steps:
            if self.is_hung:
                logger.warning("the engine has recovered: it completed a step")
            self._num_steps, self._num_ticks = engine.num_steps, 0
            return
        self._num_ticks += 1
        if self._num_ticks == self._limit:
            seconds = self._num_ticks * TICK_SECONDS
            logger.critical("the engine is hung: no step has completed for %g s, and /livez fails", seconds)
            engine.give_up()

    def update_metrics(self) -> None:
        """Set the gauges of this model, and add to its counters."""
        name, stats, counted = self.name, self.engine.stats(), self._counted
        self._counted = stats
        _set_gauges(name, stats)
        metrics.PROMPT_TOKENS.labels(name).inc(stats.prompt_tokens - counted.prompt_tokens)
        metrics.GENERATION_TOKENS.labels(name).inc(stats.generated_tokens - counted.generated_tokens)
        metrics.PREFIX_QUERIES.labels(name).inc(stats.prompt_tokens - counted.prompt_tokens)
        metrics.PREFIX_HITS.labels(name).inc(stats.cached_tokens - counted.cached_tokens)
        metrics.PREEMPTIONS.labels(name).inc(stats.preemptions - counted.preemptions)
        while self.engine.queue_seconds:
            metrics.QUEUE_TIME.labels(name).observe(self.engine.queue_seconds.popleft())


def _set_gauges(name: str, stats: EngineStats) -> None:
    metrics.RUNNING.labels(name).set(stats.num_running)
    metrics.WAITING.labels(name).set(stats.num_waiting)
    metrics.KV_TOKENS.labels(name).set(stats.kv_tokens_total)
    metrics.KV_TOKENS_USED.labels(name).set(stats.kv_tokens_used)
    metrics.KV_TOKENS_CACHED.labels(name).set(stats.kv_tokens_cached)
    metrics.KV_USAGE.labels(name).set(stats.kv_tokens_used / max(1, stats.kv_tokens_total))


class HealthMonitor:
    """Health and gauges of this worker. For one event loop."""

    def __init__(
        self, registry: ModelRegistry, admission: Admission, state: ServerState, max_step_seconds: float
    ) -> None:
        """max_step_seconds: an engine that has work and completes no step for so long is treated as hung."""
        self._registry = registry
        self._admission = admission
        self._state = state
        self._max_ticks = max(1, round(max_step_seconds / TICK_SECONDS))
        self._watches: dict[str, EngineWatch] = {}  # of the models that are in memory

    @property
    def is_hung(self) -> bool:
        return any(watch.is_hung for watch in self._watched())

    @property
    def is_alive(self) -> bool:
        """Whether this process can answer again; if not, it has to be restarted. One of several models that could not
        be loaded is no reason for it."""
        models = self._registry.models
        if len(models) == 1 and models[0].running is None:
            return models[0].error is None
        return all(watch.engine.is_alive and not watch.is_hung for watch in self._watched())

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be answered: what is preloaded is there, or has failed beside others."""
        preloaded = [model for model in self._registry.models if model.is_preloaded]
        waits = any(not model.was_loaded and model.error is None for model in preloaded)
        has_any = not preloaded or any(model.was_loaded for model in preloaded)
        return has_any and not waits and self.is_alive and not self._state.is_draining

    def _watched(self) -> list[EngineWatch]:
        """One watch for each engine that runs now; the gauges of one that was unloaded become 0."""
        running = {model.name: model.running for model in self._registry.models}
        for name, watch in list(self._watches.items()):
            now = running[name]
            if now is None or now.engine is not watch.engine:
                del self._watches[name]
                _set_gauges(name, EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0))
        for name, model in running.items():
            if model is not None and name not in self._watches:
                self._watches[name] = EngineWatch(name, model.engine, self._max_ticks)
        return list(self._watches.values())

    async def run(self, also: Callable[[], object]) -> None:
        """Call `tick` and `also` every second, until cancelled."""
        metrics.begin([model.name for model in self._registry.models])
        while True:
            try:
                self.tick()
                also()
            except Exception:
                logger.exception("the health check of the engine failed")  # the next one has to run all the same
            await asyncio.sleep(TICK_SECONDS)

    def tick(self) -> None:
        """Check the engines' progress."""
        self.update_metrics()
        for watch in self._watched():
            watch.tick()

    def update_metrics(self) -> None:
        """Set the gauges, and add to the counters what the engines have done since the last call."""
        metrics.READY.set(self.is_ready)
        metrics.IN_FLIGHT.set(self._admission.num_answers)
        for model in self._registry.models:
            metrics.LOADED.labels(model.name).set(model.running is not None)
        for watch in self._watched():
            watch.update_metrics()

    async def ready_response(self, _: Request) -> Response:
        """GET /health and /ping: the status of /readyz."""
        return Response(status_code=200 if self.is_ready else 503)

    async def metrics_response(self, _: Request) -> Response:
        """GET /metrics."""
        self.update_metrics()
        return Response(await asyncio.to_thread(metrics.exposition), media_type=CONTENT_TYPE)
