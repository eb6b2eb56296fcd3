"""What goes into the engine, what comes out, and the socket a network fits. No torch at import, no text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. Values are trusted: `serving.openai.chat.request` checked them."""

    max_tokens: int
    temperature: float = 1.0  # 0 means greedy
    top_p: float = 1.0  # 0 keeps only the most likely token
    top_k: int = 0  # 0 means all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    num_top_logprobs: int | None = None  # None: no log-probabilities at all


@dataclass(frozen=True)
class TokenLogprob:
    """The natural log-probability of a sampled token, and the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenMask(Protocol):
    """Says which tokens may come next in one answer. Both methods are called by the engine thread, in turn.

    An exception fails the one request that the mask belongs to.
    """

    @property
    def specification(self) -> str:
        """What it was made of, for engines that sample in other processes and have to make it there once more."""
        ...

    def allowed(self) -> Tensor | None:
        """Bit i % 32 of word i // 32 is set if token i may come next: [ceil(num_tokens / 32)] int32 on the CPU.

        None lets every token pass. At least one bit is set. The tensor is read before the next call.
        """
        ...

    def accept(self, token_id: int) -> None:
        """This token was sampled; every sampled token is told, once and in order, stop tokens included."""
        ...


@dataclass(frozen=True)
class TokenOutput:
    """One sampled token of one request. The last one carries the finish reason.

    A stop token is reported too (as the last step): the caller counts it and keeps it out of the text.
    """

    token_id: int
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    num_cached_tokens: int = 0  # prompt tokens whose keys and values were reused; the same in every step


@dataclass(frozen=True)
class PoolingOutput:
    """What one text came to: the mean of its hidden states after the final norm. The only step of its request."""

    vector: tuple[float, ...]  # [hidden_size], summed in float32
    finish_reason: FinishReason = "stop"


class EngineError(Exception):
    """Root of what the engine raises to a caller."""


class RequestFailed(EngineError):
    """This one request cannot be answered (numbers that are not finite, a fault in its own step)."""


class NotFinite(RequestFailed):
    """The network produced NaN or infinity for this request: broken weights, or a precision too narrow for them."""


class OutOfMemory(RequestFailed):
    """The device had no memory left for the step that this request was in; the engine goes on."""


class RequestTooLarge(EngineError):
    """The request can never fit into the cache, whatever else finishes."""

    def __init__(self, message: str, num_needed: int, num_tokens: int) -> None:
        super().__init__(message)
        self.num_needed = num_needed  # tokens of cache
        self.num_tokens = num_tokens  # what there is


class EngineStopped(EngineError):
    """The engine is shutting down or dead; the request was not (or not completely) answered."""


@dataclass(frozen=True)
class PromptLayout:
    """How the tokens of one prompt see each other. The default is a plain causal model."""

    num_two_way: int = 0  # the first tokens that all see each other; they must go through in one forward
    mask_index: int = 0  # ChatGLM-6B: where the mask token stands, at which later block positions freeze


CAUSAL = PromptLayout()


@dataclass(frozen=True)
class Span:
    """A run of neighbouring rows of a ragged batch that belong to one sequence."""

    start: int  # first row
    stop: int  # one past the last row
    layout: PromptLayout


@dataclass(frozen=True)
class RaggedBatch:
    """One step's rows: decode rows and prefill chunks of many sequences, end to end, without padding."""

    token_ids: Tensor  # [rows] int64
    indices: Tensor  # [rows] int64: each token's index in its own sequence, from 0
    spans: tuple[Span, ...]


class AttentionFunction(Protocol):
    """The engine's attention, handed to the network for one forward. It owns the KV cache.

    query: [rows, heads, head_dim]; key, value: [rows, kv_heads, head_dim], already rotated.
    Stores key and value, lets every row see its own sequence (causally, but for PromptLayout.num_two_way),
    and returns [rows, heads, head_dim].
    """

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class NetworkShape:
    """What the engine has to know about a network to make room for it."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int  # width of the logits; may be more than the tokenizer knows
    num_tokens: int  # ids at or past this are never sampled (they have no text)
    max_positions: int  # trained length, prompt and answer together


@runtime_checkable
class CanPrepare(Protocol):
    """A network that has something to do before its first forward, for which start-up should take the time."""

    def prepare(self) -> None:
        """Returns within half a minute."""
        ...


class CausalLM(Protocol):
    """The socket for networks: a ragged batch of ids in, one vector a row out. Stateless but for its weights."""

    shape: NetworkShape
    device: torch.device
    dtype: torch.dtype

    def layout(self, prompt_ids: Sequence[int]) -> PromptLayout:
        """How this prompt's tokens see each other; CAUSAL for every decoder but ChatGLM-6B."""
        ...

    def forward(self, batch: RaggedBatch, attend: AttentionFunction) -> Tensor:
        """Hidden state of every row after the final norm, [rows, hidden_size]. Calls `attend` once a layer."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows, vocab_size], unnormalised."""
        ...


@dataclass(frozen=True)
class EngineLimits:
    """How much the engine may take on at once."""

    max_sequences: int = 64  # running at once
    max_batch_tokens: int = 512  # rows of one step, decode and prefill together
    kv_tokens: int = field(default=16_384)  # capacity of the cache
    kv_dtype: torch.dtype | None = None  # keys and values are kept in it; None: in the network's own


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of what the engine is doing."""

    num_running: int
    num_waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


ResultT_co = TypeVar("ResultT_co", TokenOutput, PoolingOutput, covariant=True)


@dataclass(frozen=True)
class EngineCapabilities:
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


class Engine(Protocol):
    """Generates for many requests at once. `generate` and `embed` in the event loop, the rest from any thread."""

    capabilities: EngineCapabilities
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
    ) -> Steps[TokenOutput]:
        """One answer for each of `samplings`. Raises RequestTooLarge if prompt and answer can never fit."""
        ...

    def embed(self, texts: Sequence[tuple[Sequence[int], range]]) -> Steps[PoolingOutput]: ...

    def stats(self) -> EngineStats: ...

    def give_up(self) -> None:
        """End every request in flight, for an engine that hangs."""
        ...

    def stop(self, max_seconds: float | None = None) -> None: ...
