"""What an engine returns for a request: sampled tokens, pooled vectors, or an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprob:
    """The natural log-probability of a sampled token, and the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenOutput:
    """One sampled token of one request. The last one carries the finish reason.

    A stop token is reported too, as the last output: the caller counts it and keeps it out of the text.
    """

    token_id: int
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    num_cached_tokens: int = 0  # prompt tokens whose keys and values were reused; the same in every output


@dataclass(frozen=True)
class PoolingOutput:
    """The mean of one text's hidden states after the final norm. The only output of its sequence."""

    vector: tuple[float, ...]  # [hidden_size], summed in float32
    finish_reason: FinishReason = "stop"


class EngineError(Exception):
    """Base of what the engine raises to a caller."""


class RequestFailed(EngineError):
    """This request failed; others are not affected."""


class NotFinite(RequestFailed):
    """The network produced NaN or infinity for this request: broken weights, or a precision too narrow for them."""


class OutOfMemory(RequestFailed):
    """The device had no memory left for the step that this request was in; the engine continues."""


class RequestTooLarge(EngineError):
    """The request needs more KV cache than the engine has."""

    def __init__(self, message: str, num_needed: int, num_tokens: int) -> None:
        super().__init__(message)
        self.num_needed = num_needed  # tokens of cache
        self.num_tokens = num_tokens  # the capacity of the cache


class UnknownToken(EngineError):
    """A prompt has an id that the network has no embedding for. Prompts are checked before; this is the last guard."""

    def __init__(self, token_id: int) -> None:
        super().__init__(f"the network has no token {token_id}")
        self.token_id = token_id


class EngineStopped(EngineError):
    """The engine is stopping, dead or hanging; the request was not completed."""
