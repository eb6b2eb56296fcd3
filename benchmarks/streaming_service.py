"""The real service with an engine that only ticks, for `benchmarks.streaming`.

Everything from the socket to the chat events is what users get: BentoML, the gate, admission, validation, the prompt,
the fold, the feed.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass, fields
from typing import Any, cast

import service
from benchmarks.streaming_ticks import Ticks
from models.families import FAMILIES
from serving.generation.interface import ChatEvent, Finished, TextDelta, Usage
from serving.generation.pipeline import Prompt, RunningModel
from serving.worker.start_native import start_model

ticks = Ticks(float(os.environ["TICK_SECONDS"]))


@dataclass(frozen=True)
class Ticking(RunningModel):
    """The demonstration model, whose answers are ticks."""

    async def complete(self, prompt: Prompt, priority: int = 0) -> AsyncGenerator[tuple[int, ChatEvent], None]:
        number = prompt.sampling.max_tokens
        async for word in ticks.words(number):
            yield 0, TextDelta(word)
        yield 0, Finished("length", Usage(len(prompt.token_ids), number))


def _load(self: Any) -> None:
    load, stored = FAMILIES[service.stored.family].load, service.stored
    real = start_model(load, stored.path, stored.metadata, service.settings, service.logger)
    service.served.model = Ticking(**{field.name: getattr(real, field.name) for field in fields(real) if field.init})


cast("Any", service.ChatGLM2).inner._load = _load
svc = service.ChatGLM2
