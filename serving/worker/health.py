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
from serving.engine.interface import Engine, EngineStats
from serving.http.access_middleware import ServerState
from serving.registry import ModelRegistry

TICK_SECONDS = 1.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

logger = logging.getLogger(__name__)


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
        self._num_ticks = 0  # without progress; counted, not timed: a process that was stopped has not hung
        self._num_steps = -1
        self._counted = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0)  # what the counters contain so far

    @property
    def is_hung(self) -> bool:
        model = self._registry.model
        return model is not None and self._num_ticks >= self._limit(model.engine)

    def _limit(self, engine: Engine) -> int:
        """Ticks without progress; more for a step of more rows than a step has by its setting."""
        return math.ceil(self._max_ticks * max(1.0, engine.step_size))

    @property
    def is_alive(self) -> bool:
        """Whether this process can answer again; if not, it has to be restarted."""
        model = self._registry.model
        if model is None:
            return self._registry.error is None
        return model.engine.is_alive and not self.is_hung

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be answered."""
        return self._registry.model is not None and self.is_alive and not self._state.is_draining

    async def run(self, also: Callable[[], object]) -> None:
        """Call `tick` and `also` every second, until cancelled."""
        while True:
            try:
                self.tick()
                also()
            except Exception:
                logger.exception("the health check of the engine failed")  # the next one has to run all the same
            await asyncio.sleep(TICK_SECONDS)

    def tick(self) -> None:
        """Check the engine's progress; at the limit, have it fail its requests."""
        self.update_metrics()
        model = self._registry.model
        if model is None:
            return
        engine = model.engine
        if not engine.is_busy or engine.num_steps != self._num_steps:
            if self.is_hung:
                logger.warning("the engine has recovered: it completed a step")
            self._num_steps, self._num_ticks = engine.num_steps, 0
            return
        self._num_ticks += 1
        if self._num_ticks == self._limit(engine):
            seconds = self._num_ticks * TICK_SECONDS
            logger.critical("the engine is hung: no step has completed for %g s, and /livez fails", seconds)
            engine.give_up()

    def update_metrics(self) -> None:
        """Set the gauges, and add to the counters what the engine has done since the last call."""
        metrics.READY.set(self.is_ready)
        metrics.IN_FLIGHT.set(self._admission.num_answers)
        if self._registry.model is None:
            return
        engine = self._registry.model.engine
        stats, counted = engine.stats(), self._counted
        self._counted = stats
        metrics.RUNNING.set(stats.num_running)
        metrics.WAITING.set(stats.num_waiting)
        metrics.KV_TOKENS.set(stats.kv_tokens_total)
        metrics.KV_TOKENS_USED.set(stats.kv_tokens_used)
        metrics.KV_TOKENS_CACHED.set(stats.kv_tokens_cached)
        metrics.KV_USAGE.set(stats.kv_tokens_used / stats.kv_tokens_total)
        metrics.PROMPT_TOKENS.inc(stats.prompt_tokens - counted.prompt_tokens)
        metrics.GENERATION_TOKENS.inc(stats.generated_tokens - counted.generated_tokens)
        metrics.PREFIX_QUERIES.inc(stats.prompt_tokens - counted.prompt_tokens)
        metrics.PREFIX_HITS.inc(stats.cached_tokens - counted.cached_tokens)
        metrics.PREEMPTIONS.inc(stats.preemptions - counted.preemptions)
        while engine.queue_seconds:
            metrics.QUEUE_TIME.observe(engine.queue_seconds.popleft())

    async def metrics_response(self, _: Request) -> Response:
        """GET /metrics."""
        self.update_metrics()
        return Response(await asyncio.to_thread(metrics.exposition), media_type=CONTENT_TYPE)
