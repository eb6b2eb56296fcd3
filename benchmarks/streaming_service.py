"""The deployed service with answers from a fixed-rate token source instead of the engine, for `benchmarks.streaming`.

Everything except the engine is unchanged: BentoML, access middleware, admission, validation, prompt, event stream,
server-sent events.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass, fields
from typing import Any, cast

import service
from benchmarks.streaming_source import TokenSource
from models.families import FAMILIES
from serving.generation.interface import ChatEvent, Finished, TextDelta, Usage
from serving.generation.pipeline import Prompt, RunningModel
from serving.worker.start_native import start_model

source = TokenSource(float(os.environ["TICK_SECONDS"]))


@dataclass(frozen=True)
class FixedRateModel(RunningModel):
    """The demonstration model with answers from `source`."""

    async def complete(self, prompt: Prompt, priority: int = 0) -> AsyncGenerator[tuple[int, ChatEvent], None]:
        number = prompt.sampling.max_tokens
        async for word in source.words(number):
            yield 0, TextDelta(word)
        yield 0, Finished("length", Usage(len(prompt.token_ids), number))


def _load(self: Any) -> None:
    load, stored = FAMILIES[service.stored.family].load, service.stored
    real = start_model(load, stored.path, stored.metadata, service.settings, service.logger)
    service.registry.model = FixedRateModel(
        **{field.name: getattr(real, field.name) for field in fields(real) if field.init}
    )


cast("Any", service.ChatGLM2).inner._load = _load
svc = service.ChatGLM2
