"""Texts -> embedding vectors, computed by the engine that also generates.

The vector is the mean of the last hidden states over the text's own tokens, with length 1. The models served here were
trained to generate, not to embed: similar texts have nearer vectors than others, and no more is guaranteed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from serving.engine.output_queue import OutputQueue
from serving.engine.outputs import PoolingOutput
from serving.generation.interface import ChatFormat, PromptError, PromptTooLong
from serving.generation.pipeline import ContextOverflow, RunningModel

MAX_TEXTS_AT_ONCE = 16  # of one request in the engine: a list of thousands must not delay other requests


@dataclass(frozen=True)
class EmbeddedText:
    """One accepted input."""

    token_ids: tuple[int, ...]
    counted: range  # of `token_ids`: those whose hidden states are averaged


def tokenize(model: RunningModel, inputs: Sequence[str | tuple[int, ...]]) -> list[EmbeddedText]:
    """Tokenize and check the inputs. Raises PromptError. Pure; any thread."""
    if not model.engine.capabilities.has_embeddings:
        raise PromptError("This server's engine does not support embeddings.", "input")
    return [_tokenize(model, value, "input" if len(inputs) == 1 else f"input[{i}]") for i, value in enumerate(inputs)]


async def embed(model: RunningModel, texts: Sequence[EmbeddedText]) -> list[list[float]]:
    """One vector of length 1 for each text, [texts][hidden_size]. Cancel it to stop. Raises EngineError only."""
    vectors: list[list[float]] = [[] for _ in texts]
    for first in range(0, len(texts), MAX_TEXTS_AT_ONCE):
        some = texts[first : first + MAX_TEXTS_AT_ONCE]
        with closing(OutputQueue[PoolingOutput]()) as queue:
            model.engine.embed([(text.token_ids, text.counted) for text in some], queue)
            while (outputs := await queue.take()) is not None:
                for index, output in outputs:
                    vectors[first + index] = normalized(output.vector)
    return vectors


def normalized(vector: Sequence[float]) -> list[float]:
    """The same direction with length 1."""
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector] if length else list(vector)


def _tokenize(model: RunningModel, value: str | tuple[int, ...], param: str) -> EmbeddedText:
    chat_format = model.chat_format
    try:
        token_ids = tuple(model.encode(value, param, model.context_length))
    except PromptTooLong as error:
        raise ContextOverflow(error.min_tokens, 0, model.context_length, param, is_minimum=True) from None
    counted = _own_tokens(chat_format, token_ids) if isinstance(value, str) else range(len(token_ids))
    if not counted:
        raise PromptError("The input must not be empty: it has no token to be embedded.", param)
    if len(token_ids) > model.context_length:
        raise ContextOverflow(len(token_ids), 0, model.context_length, param)
    return EmbeddedText(token_ids, counted)


def _own_tokens(chat_format: ChatFormat, token_ids: Sequence[int]) -> range:
    """The range of a text's tokens without the special ones that the format adds at either end."""
    first, last = 0, len(token_ids)
    while first < last and not chat_format.token_bytes(token_ids[first]):
        first += 1
    while first < last and not chat_format.token_bytes(token_ids[last - 1]):
        last -= 1
    return range(first, last)
