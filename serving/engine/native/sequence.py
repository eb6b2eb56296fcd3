"""The state of one sequence: its tokens, how many are computed, its cache blocks. Changed by the engine thread only."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from serving.engine.interface import CAUSAL, PromptLayout, SamplingParams, TokenMask
from serving.engine.native.prompt_lookup import PromptLookup
from serving.engine.output_queue import OutputQueue, SequenceCommand
from serving.engine.outputs import FinishReason

BLOCK = 16  # tokens of a KV-cache block; kernels/native/attention.h has the same

Command = SequenceCommand | Literal["add"]

_ids = count()


Key = tuple[Hashable, tuple[int, ...]]  # (the node before, or what distinguishes prompts of equal tokens; the tokens)


def placeholders(num_tokens: int) -> list[int]:
    """What stands for the tokens of a trained prefix; no id of a vocabulary."""
    return list(range(-1, -1 - num_tokens, -1))


def two_way_end(layout: PromptLayout, num_trained: int) -> int:
    """Tokens from the beginning of the cache on that attend to each other both ways; 0 for a causal prompt."""
    return layout.num_two_way and num_trained + layout.num_two_way


@dataclass(eq=False)
class Node:
    """One full block of the prefix tree."""

    block: int
    key: Key = field(repr=False)
    owner: SequenceState | None  # that is about to compute it, for which others wait; None once it is computed


@dataclass(eq=False)
class SequenceState:
    """A prompt and the tokens generated after it, or a text whose hidden states are averaged."""

    # a trained prefix's placeholders, prompt, then answer; an exception with a sequence in its text has no prompt in it
    token_ids: list[int] = field(repr=False)
    sampling: SamplingParams
    layout: PromptLayout = CAUSAL
    priority: int = 0  # smaller goes first
    seed: int = 0
    mask: TokenMask | None = None
    num_trained: int = 0  # tokens of a trained prefix
    pooled: range | None = None  # the tokens whose hidden states are averaged; then nothing is sampled
    id: int = field(default_factory=lambda: next(_ids))
    num_prompt_tokens: int = field(init=False)
    num_computed: int = 0  # tokens whose keys and values are in the cache
    num_cached_tokens: int = 0  # prompt tokens that did not have to be computed at first admission
    num_preemptions: int = 0
    is_paused: bool = False  # its reader is far behind: it keeps its blocks and gets no rows
    queued_at: float | None = None  # time.monotonic() of its arrival, until its first rows
    lookup: PromptLookup | None = None  # made for the first draft
    blocks: list[int] = field(default_factory=list)  # block i holds tokens i * BLOCK on; empty while waiting
    nodes: list[Node] = field(default_factory=list, repr=False)  # of the full blocks, in the prefix tree
    prefix_key: Hashable = None  # sequences of different keys share no prefix: an adapter, a cache salt
    awaited: Node | None = field(default=None, repr=False)  # a block that another sequence is about to compute
    state: Literal["waiting", "running", "finished"] = "waiting"

    _full_blocks: list[tuple[int, ...]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_two_way(self) -> int:
        """See `two_way_end`."""
        return two_way_end(self.layout, self.num_trained)

    @property
    def prefix_root(self) -> Hashable:
        """What distinguishes the keys and values of equal tokens."""
        return self.layout, self.prefix_key

    def full_blocks(self, stop: int, start: int = 0) -> Iterator[tuple[int, ...]]:
        """The tokens of blocks `start` to `stop`; made once."""
        for index in range(len(self._full_blocks), stop):
            self._full_blocks.append(tuple(self.token_ids[index * BLOCK : (index + 1) * BLOCK]))
        return iter(self._full_blocks[start:stop])

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Rows to compute before the next token can be sampled."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        return self.num_uncomputed > 1

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """(prompt tokens that are computed, prompt tokens)"""
        size = self.num_prompt_tokens - self.num_trained
        return max(0, min(self.num_computed - self.num_trained, size)), size

    def append(self, token_id: int) -> FinishReason | None:
        """Add a sampled token; the reason if it was the last one."""
        self.token_ids.append(token_id)
        if token_id in self.sampling.stop_token_ids and self.num_generated > self.sampling.min_tokens:
            return "stop"
        if self.num_generated >= self.sampling.max_tokens:
            return "length"
        return None


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence and the queue that its outputs go to. Implements serving.engine.output_queue.RunningSequence."""

    send_commands: Callable[[list[tuple[Request, Command]]], None]  # of the engine
    sequence: SequenceState
    queue: OutputQueue[Any]
    index: int

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """See RunningSequence. Of prompts with equal beginnings one is computed and the others wait for it."""
        return self.sequence.prompt_progress

    def send(self, command: SequenceCommand) -> None:
        """See RunningSequence."""
        self.send_commands([(self, command)])
