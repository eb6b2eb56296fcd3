"""The state of one sequence: its tokens, how many are computed, its cache slots. Changed by the engine thread only."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from serving.engine.interface import CAUSAL, PromptLayout, SamplingParams, TokenMask
from serving.engine.native.prompt_lookup import PromptLookup
from serving.engine.outputs import FinishReason

_ids = count()


@dataclass(eq=False)
class SlotRange:
    """Contiguous KV-cache slots. The keys and values of a sequence's token i are in slot `start + i`."""

    start: int
    capacity: int


@dataclass(eq=False)
class SequenceState:
    """A prompt and the tokens generated after it, or a text whose hidden states are averaged."""

    token_ids: list[int]  # prompt, then answer
    sampling: SamplingParams
    layout: PromptLayout = CAUSAL
    priority: int = 0  # smaller goes first
    seed: int = 0
    mask: TokenMask | None = None
    pooled: range | None = None  # the tokens whose hidden states are averaged; then nothing is sampled
    id: int = field(default_factory=lambda: next(_ids))
    num_prompt_tokens: int = field(init=False)
    num_computed: int = 0  # tokens whose keys and values are in the cache
    num_cached_tokens: int = 0  # prompt tokens that did not have to be computed at first admission
    num_preemptions: int = 0
    is_paused: bool = False  # its reader is far behind: it keeps its slots and gets no rows
    queued_at: float | None = None  # time.monotonic() of its arrival, until its first rows
    lookup: PromptLookup | None = None  # made for the first draft
    slots: SlotRange | None = None  # None while waiting
    state: Literal["waiting", "running", "finished"] = "waiting"

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

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

    def append(self, token_id: int) -> FinishReason | None:
        """Add a sampled token; the reason if it was the last one."""
        self.token_ids.append(token_id)
        if token_id in self.sampling.stop_token_ids and self.num_generated > self.sampling.min_tokens:
            return "stop"
        if self.num_generated >= self.sampling.max_tokens:
            return "length"
        return None
