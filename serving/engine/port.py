"""The engine's port: token ids in, steps out. What the server wants of any engine; ours and vLLM's both fit it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from serving.engine.types import EngineLimits, NetworkShape, Pooled, SamplingParams, Step, TokenMask

if TYPE_CHECKING:
    from serving.engine.engine import EngineStats

ResultT_co = TypeVar("ResultT_co", Step, Pooled, covariant=True)


@dataclass(frozen=True)
class Abilities:
    """What an engine can do besides answering; requests for the rest are refused before they reach it."""

    has_masks: bool = True  # answers held to a grammar
    has_embeddings: bool = True


class Steps(Protocol[ResultT_co]):
    """The answers to one request as they come: (choice, step). Leaving the context cancels what is still running.

    Raises RequestFailed for a fault of this request alone and EngineStopped if the engine ends first.
    """

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...
    def __aiter__(self) -> Self: ...
    async def __anext__(self) -> tuple[int, ResultT_co]: ...

    def cancel(self, *choices: int) -> None:
        """No more steps of these choices are wanted."""
        ...


class EnginePort(Protocol):
    """Generates for many requests at once. `generate` and `embed` in the event loop, the rest from any thread."""

    abilities: Abilities
    limits: EngineLimits
    shape: NetworkShape

    @property
    def num_steps(self) -> int:
        """Ended steps: whoever watches sees progress."""
        ...

    @property
    def is_busy(self) -> bool: ...

    @property
    def queue_seconds(self) -> deque[float]:
        """Of sequences that got their first rows; the reader pops."""
        ...

    @property
    def is_alive(self) -> bool: ...

    def generate(
        self,
        prompt_ids: Sequence[int],
        samplings: Sequence[SamplingParams],
        priority: int = 0,
        masks: Sequence[TokenMask | None] | None = None,
    ) -> Steps[Step]:
        """One answer for each of `samplings`. Raises RequestTooLarge if prompt and answer can never fit."""
        ...

    def embed(self, texts: Sequence[tuple[Sequence[int], range]]) -> Steps[Pooled]: ...

    def stats(self) -> EngineStats: ...

    def give_up(self) -> None:
        """End every request in flight, for an engine that hangs."""
        ...

    def stop(self, max_seconds: float | None = None) -> None: ...
