"""The deployed service with an engine that emits tokens at a fixed rate, for `benchmarks.streaming`.

Everything except the engine is unchanged: BentoML, access middleware, admission, validation, prompt, event stream,
detokenizing, server-sent events.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from itertools import cycle
from typing import Any, cast

import service
from serving.engine.interface import SamplingParams, TokenMask
from serving.engine.output_queue import OutputQueue, SequenceCommand
from serving.engine.outputs import TokenOutput
from serving.generation.interface import ChatFormat
from serving.generation.pipeline import RunningModel
from serving.registry import ServedModel
from serving.worker.model_loader import ModelLoader
from serving.worker.model_source import StartedModel
from serving.worker.start_native import start_model


class Answer:
    """So many tokens, one a tick. Implements RunningSequence."""

    def __init__(self, token_ids: Sequence[int], num_tokens: int, queue: OutputQueue[TokenOutput], index: int) -> None:
        self._token_ids = cycle(token_ids)
        self._num_left = num_tokens
        self.queue, self.index = queue, index

    def send(self, command: SequenceCommand) -> None:
        if command == "cancel":
            self._num_left = 0

    def next(self) -> TokenOutput | None:
        if self._num_left <= 0:
            return None
        self._num_left -= 1
        return TokenOutput(next(self._token_ids), None if self._num_left else "length")


class Ticks:
    """`generate` of an engine whose every step takes the same time: one wake-up of the event loop for all answers."""

    def __init__(self, chat_format: ChatFormat, seconds: float) -> None:
        ids = chat_format.encode("你好，我是人工智能助手。")
        self._token_ids = [i for i in ids if chat_format.decode([i]).strip()]
        self._seconds = seconds
        self._answers: list[Answer] = []
        self._is_ticking = False

    def generate(
        self,
        prompt_ids: Sequence[int],
        samplings: Sequence[SamplingParams],
        queue: OutputQueue[TokenOutput],
        first_index: int = 0,
        priority: int = 0,
        masks: Sequence[TokenMask | None] | None = None,
    ) -> None:
        for i, sampling in enumerate(samplings):
            answer = Answer(self._token_ids, sampling.max_tokens, queue, first_index + i)
            queue.add(answer.index, answer)
            self._answers.append(answer)
        if not self._is_ticking:
            self._is_ticking = True
            queue.loop.call_later(self._seconds, self._tick)

    def _tick(self) -> None:
        going: list[Answer] = []
        for answer in self._answers:
            if (output := answer.next()) is not None:
                answer.queue.put([(answer.index, output)])
                going.append(answer)
        self._answers = going
        asyncio.get_running_loop().call_later(self._seconds, self._tick)


def _start(self: ModelLoader, served: ServedModel) -> StartedModel:
    started = start_model(service.default, service.default.settings, service.logger, name=served.name)
    model = started.running
    assert isinstance(model, RunningModel)
    ticks = Ticks(model.chat_format, float(os.environ["TICK_SECONDS"]))
    cast("Any", model.engine).generate = ticks.generate
    return started


cast("Any", ModelLoader)._start = _start
svc = service.ChatGLM2
