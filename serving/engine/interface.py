"""What generation asks of an engine, and an engine of a network: requests, limits, batches. No torch at import."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from serving.engine.output_queue import OutputQueue
from serving.engine.outputs import PoolingOutput, TokenOutput

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. The values are not checked again: `serving.openai.chat.request` did."""

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


class TokenMask(Protocol):
    """Which tokens are allowed next in one answer. Both methods are called by the engine thread, in turn.

    An exception fails the one request that the mask belongs to.
    """

    @property
    def specification(self) -> str:
        """What the mask was built from, for engines that sample in other processes and build it there again."""
        ...

    def allowed(self) -> Tensor | None:
        """Bit i % 32 of word i // 32 is set if token i is allowed: [ceil(num_tokens / 32)] int32 on the CPU.

        None allows every token. At least one bit is set. The tensor is read before the next call.
        """
        ...

    def accept(self, token_id: int) -> None:
        """This token was sampled. Called once for every sampled token, in order, stop tokens included."""
        ...


@dataclass(frozen=True)
class PromptLayout:
    """How the tokens of one prompt attend to each other. The default is a causal model."""

    num_two_way: int = 0  # the first tokens, which attend to each other both ways and must share one forward pass
    mask_index: int = 0  # ChatGLM-6B: the index of the mask token, where the positions of later blocks stay


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


@dataclass(frozen=True)
class CacheStep:
    """A step's rows and the memory of the KV cache, for networks that compute their attention themselves.

    The shapes are those of serving.engine.native.kv_memory; row numbers, lengths and tables are int32 on the host.
    """

    keys: Tensor
    values: Tensor
    scales: tuple[Tensor, Tensor] | None
    first: Tensor  # [spans + 1]: the rows of each span
    lengths: Tensor  # [spans]: tokens of the sequence, up to the last of its rows
    two_way: Tensor  # [spans]: PromptLayout.num_two_way
    tables: Tensor  # [spans, max_blocks]


class AttentionFunction(Protocol):
    """The engine's attention over its KV cache, passed to the network for one forward pass.

    cache: None where a network has to call this function.

    query: [rows, heads, head_dim]; key, value: [rows, kv_heads, head_dim], already rotated.
    Stores key and value; every row attends to its own sequence, causally but for PromptLayout.num_two_way.
    Returns [rows, heads, head_dim].
    """

    @property
    def cache(self) -> CacheStep | None: ...

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class NetworkShape:
    """What the engine needs to know of a network to allocate its KV cache."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int  # width of the logits; may be more than the tokenizer has
    num_tokens: int  # ids at or past this are never sampled (they have no text)
    max_positions: int  # trained length, prompt and answer together


class CausalLM(Protocol):
    """The interface of networks: a ragged batch of token ids in, one vector a row out. No state but the weights."""

    shape: NetworkShape
    device: torch.device
    dtype: torch.dtype

    def layout(self, prompt_ids: Sequence[int]) -> PromptLayout:
        """How this prompt's tokens attend to each other; CAUSAL for every decoder but ChatGLM-6B."""
        ...

    def forward(self, batch: RaggedBatch, attend: AttentionFunction) -> Tensor:
        """Hidden state of every row after the final norm, [rows, hidden_size]. Calls `attend` once a layer."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows, vocab_size], unnormalised."""
        ...


@dataclass(frozen=True)
class TrainedPrefix:
    """Keys and values that every sequence begins with: a P-Tuning v2 prefix. [layers, tokens, kv_heads, head_dim] each.

    They are in the cache as they are: not rotated. Positions of the tokens behind them count from 0.
    """

    keys: Tensor
    values: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.keys.shape[1])


@dataclass(frozen=True)
class EngineLimits:
    """Sizes of the engine's batches and of its KV cache."""

    max_sequences: int = 64  # running at once
    max_batch_tokens: int = 512  # rows of one step, decode and prefill together
    kv_tokens: int = 16_384  # capacity of the cache
    kv_dtype: torch.dtype | None = None  # of stored keys and values; None: the network's own; int8 with scales


@dataclass(frozen=True)
class EncoderInput:
    """One text, or two for a cross-encoder. `type_ids`: which of the two each token is of; empty for one text."""

    token_ids: tuple[int, ...]
    type_ids: tuple[int, ...] = ()


class Encoder(Protocol):
    """The interface of networks that turn a whole text into one vector, or two texts into scores."""

    num_outputs: int  # numbers of a vector
    num_tokens: int  # ids below this have a row in the embedding
    max_positions: int  # tokens of one input

    def encode(self, inputs: Sequence[EncoderInput]) -> list[list[float]]:
        """[inputs][num_outputs], computed in one padded batch."""
        ...


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine's gauges and counters."""

    num_running: int
    num_waiting: int
    kv_tokens_used: int
    kv_tokens_cached: int  # of finished sequences: known prefixes, which are evicted when their blocks are needed
    kv_tokens_total: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class EngineCapabilities:
    """What an engine supports. Requests for the rest are refused before they reach it."""

    has_masks: bool = True  # answers that follow a grammar
    has_embeddings: bool = True


class MonitoredEngine(Protocol):
    """What the health monitor asks of every engine. From any thread."""

    limits: EngineLimits

    @property
    def num_steps(self) -> int:
        """Steps that have ended: a monitor sees progress by it."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether anything was running or waiting at the beginning of the last step."""
        ...

    @property
    def step_size(self) -> float:
        """Rows of the present step as a multiple of `limits.max_batch_tokens`: a two-way prompt is never divided."""
        ...

    @property
    def queue_seconds(self) -> deque[float]:
        """Waiting times of sequences that got their first rows; the reader pops."""
        ...

    @property
    def is_alive(self) -> bool: ...

    def stats(self) -> EngineStats: ...

    def give_up(self) -> None:
        """End every request in flight with EngineStopped, for an engine that hangs."""
        ...

    def stop(self, max_seconds: float | None = None) -> None:
        """End the engine after its current step. Requests in flight get EngineStopped.

        max_seconds: the longest time to wait for the step.
        """
        ...


class Engine(MonitoredEngine, Protocol):
    """Generates for many requests at once. `generate` and `embed` in the event loop, the rest from any thread."""

    capabilities: EngineCapabilities
    shape: NetworkShape

    def generate(
        self,
        prompt_ids: Sequence[int],
        samplings: Sequence[SamplingParams],
        queue: OutputQueue[TokenOutput],
        first_index: int = 0,
        priority: int = 0,
        masks: Sequence[TokenMask | None] | None = None,
    ) -> None:
        """Start one answer for each of `samplings`. The outputs of the i-th come into `queue` as first_index + i.

        priority: smaller goes first. masks: one for each answer, from here on the engine's own.
        Raises RequestTooLarge if prompt and answer can never fit, UnknownToken for an id that the network does not
        have, EngineStopped if the engine does not run.
        """
        ...

    def embed(self, texts: Sequence[tuple[Sequence[int], range]], queue: OutputQueue[PoolingOutput]) -> None:
        """Start the mean of hidden states for each text: (its token ids, the range of those that count). The output
        of the i-th text comes into `queue` as i. Raises as `generate` does."""
        ...
