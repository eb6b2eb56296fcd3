"""Texts -> vectors, through the same engine that writes answers. Knows words and tokens, not HTTP.

The vector is the mean of the last hidden states over the text's own tokens, with length 1. The models served here were
trained to write, not to embed: what is near in meaning is nearer than what is not, and no more is promised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serving.generation.interface import ChatFormat, PromptError
from serving.generation.pipeline import ContextOverflow, RunningModel

MAX_TEXTS_AT_ONCE = 16  # of one request in the engine: a list of thousands does not hold up the answers behind it


@dataclass(frozen=True)
class EmbeddedText:
    """One input that was accepted: what the network reads, and which of it counts."""

    token_ids: tuple[int, ...]
    counted: range


def prepare(model: RunningModel, inputs: Sequence[str | tuple[int, ...]]) -> list[EmbeddedText]:
    """Everything that may be refused. Raises PromptError. Pure; any thread."""
    if not model.engine.capabilities.has_embeddings:
        raise PromptError("The engine of this server has no embeddings.", "input")
    return [_prepare(model, value, "input" if len(inputs) == 1 else f"input[{i}]") for i, value in enumerate(inputs)]


async def embed(model: RunningModel, texts: Sequence[EmbeddedText]) -> list[list[float]]:
    """One vector of length 1 for each text, [texts][hidden_size]. Cancel it to stop. Raises EngineError only."""
    vectors: list[list[float]] = [[] for _ in texts]
    for first in range(0, len(texts), MAX_TEXTS_AT_ONCE):
        some = texts[first : first + MAX_TEXTS_AT_ONCE]
        async with model.engine.embed([(text.token_ids, text.counted) for text in some]) as results:
            async for index, pooled in results:
                vectors[first + index] = normalized(pooled.vector)
    return vectors


def normalized(vector: Sequence[float]) -> list[float]:
    """The same direction with length 1."""
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector] if length else list(vector)


def _prepare(model: RunningModel, value: str | tuple[int, ...], param: str) -> EmbeddedText:
    chat_format = model.chat_format
    if isinstance(value, str):
        token_ids = tuple(chat_format.encode(value))
        counted = _own_tokens(chat_format, token_ids)
    else:
        unknown = next((i for i in value if not 0 <= i < chat_format.num_tokens), None)
        if unknown is not None:
            raise PromptError(f"This model has no token {unknown}.", param)
        token_ids, counted = value, range(len(value))
    if not counted:
        raise PromptError("The input must not be empty: it has no token to be embedded.", param)
    if len(token_ids) > model.context_length:
        raise ContextOverflow(len(token_ids), 0, model.context_length, param)
    return EmbeddedText(token_ids, counted)


def _own_tokens(chat_format: ChatFormat, token_ids: Sequence[int]) -> range:
    """A text's tokens without the special ones that the model wants before or behind every text."""
    first, last = 0, len(token_ids)
    while first < last and not chat_format.token_bytes(token_ids[first]):
        first += 1
    while first < last and not chat_format.token_bytes(token_ids[last - 1]):
        last -= 1
    return range(first, last)
