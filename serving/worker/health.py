"""Watches the engine from the event loop: is it alive, does it get on, what do the gauges say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from serving import metrics
from serving.admission.admission_control import Admission
from serving.engine.interface import EngineStats
from serving.registry import ModelRegistry
from serving.worker.graceful_shutdown import GracefulShutdown

TICK_SECONDS = 1.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

logger = logging.getLogger(__name__)


class HealthMonitor:
    """Health and gauges of this worker. For one event loop."""

    def __init__(
        self, served: ModelRegistry, admission: Admission, drain: GracefulShutdown, max_step_seconds: float
    ) -> None:
        """max_step_seconds: an engine that has work and ends no step for so long counts as hanging."""
        self._served = served
        self._admission = admission
        self._drain = drain
        self._max_ticks = max(1, round(max_step_seconds / TICK_SECONDS))
        self._num_ticks = 0  # without progress; counted, not timed: a process that was stopped has not hung
        self._num_steps = -1
        self._told = EngineStats(0, 0, 0, 0, 0, 0, 0, 0)  # what the counters have been told so far

    @property
    def is_hanging(self) -> bool:
        return self._num_ticks >= self._max_ticks

    @property
    def is_alive(self) -> bool:
        """Whether this process can ever answer again; if not, it has to be restarted."""
        if self._served.model is None:
            return self._served.error is None
        return self._served.model.engine.is_alive and not self.is_hanging

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be answered."""
        return self._served.model is not None and self.is_alive and not self._drain.is_draining

    async def run(self, also: Callable[[], object]) -> None:
        """Look every second, and do something else, until cancelled."""
        metrics.forget_dead_workers()
        while True:
            try:
                self.tick()
                also()
            except Exception:
                logger.exception("a look at the engine failed")  # the next one must take place nevertheless
            await asyncio.sleep(TICK_SECONDS)

    def tick(self) -> None:
        """One second has passed."""
        self.look()
        model = self._served.model
        if model is None:
            return
        engine = model.engine
        if not engine.is_busy or engine.num_steps != self._num_steps:
            if self.is_hanging:
                logger.warning("the engine goes on")
            self._num_steps, self._num_ticks = engine.num_steps, 0
            return
        self._num_ticks += 1
        if self._num_ticks == self._max_ticks:
            logger.critical("no step of the engine has ended for %g s: not alive", self._num_ticks * TICK_SECONDS)
            engine.give_up()

    def look(self) -> None:
        """Bring the metrics up to date."""
        metrics.READY.set(self.is_ready)
        metrics.IN_FLIGHT.set(self._admission.num_answers)
        if self._served.model is None:
            return
        engine = self._served.model.engine
        stats, told = engine.stats(), self._told
        self._told = stats
        metrics.RUNNING.set(stats.num_running)
        metrics.WAITING.set(stats.num_waiting)
        metrics.KV_TOKENS.set(stats.kv_tokens_total)
        metrics.KV_TOKENS_USED.set(stats.kv_tokens_used)
        metrics.KV_USAGE.set(stats.kv_tokens_used / stats.kv_tokens_total)
        metrics.PROMPT_TOKENS.inc(stats.prompt_tokens - told.prompt_tokens)
        metrics.GENERATION_TOKENS.inc(stats.generated_tokens - told.generated_tokens)
        metrics.PREFIX_QUERIES.inc(stats.prompt_tokens - told.prompt_tokens)
        metrics.PREFIX_HITS.inc(stats.cached_tokens - told.cached_tokens)
        metrics.PREEMPTIONS.inc(stats.preemptions - told.preemptions)
        while engine.queue_seconds:
            metrics.QUEUE_TIME.observe(engine.queue_seconds.popleft())

    async def exposition(self, _: Request) -> Response:
        """GET /metrics."""
        self.look()
        return Response(await asyncio.to_thread(metrics.exposition), media_type=CONTENT_TYPE)
