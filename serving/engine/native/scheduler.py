"""Selects the rows of the next forward pass and assigns KV-cache blocks to them. Pure policy: no torch, no clock.

A step has one row for every decoding sequence; the rest of its budget is filled with chunks of prompts. First come,
first served within a priority. When the cache is full, prefixes that nobody uses are evicted first, then the youngest
sequence is preempted: it gives up its blocks and is computed again later, with the same tokens as result.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, replace

from serving.engine.native.block_manager import BlockCopy, BlockManager, PrefixMatch, num_blocks_for
from serving.engine.native.prompt_lookup import MAX_DECODING, PromptLookup
from serving.engine.native.sequence import BLOCK, SequenceState

STRETCH = 1.5  # a step with prompt rows may take this much longer than one without
MIN_PROMPT_ROWS = 32  # fewer would read all weights for next to nothing
GPU_MIN_PROMPT_ROWS = 512  # a step with prompts takes a GPU's host as long for 32 rows: it is no CUDA graph
BACKLOG = 1500  # rows of waiting prompts; with more, steps are stretched further, in proportion
MAX_STRETCH_FACTOR = 6.0
MEMORY = 0.8  # of the running averages
MIN_SHARE = 0.2  # of a step's time, for its rows and for the step itself: measurements are noisy


@dataclass(frozen=True)
class ScheduledSequence:
    """The next `num_rows` uncomputed tokens of a sequence, and draft tokens that may follow them."""

    sequence: SequenceState
    num_rows: int
    draft: tuple[int, ...] = ()

    @property
    def is_sampled(self) -> bool:
        """Whether a token can be sampled after these rows."""
        return self.num_rows == self.sequence.num_uncomputed


@dataclass(frozen=True)
class SchedulerOutput:
    """Blocks to copy, in order, then the rows of one forward pass."""

    copies: tuple[BlockCopy, ...]
    decoding: tuple[ScheduledSequence, ...]  # one row each, and the rows of its draft
    chunks: tuple[ScheduledSequence, ...]  # of prompts

    @property
    def scheduled(self) -> tuple[ScheduledSequence, ...]:
        """All rows, in the order of the forward pass."""
        return self.decoding + self.chunks

    @property
    def num_prompt_rows(self) -> int:
        return sum(chunk.num_rows for chunk in self.chunks)

    def split(self, num_oldest: int) -> tuple[SchedulerOutput, SchedulerOutput]:
        """(the rows of the other sequences, the rows of the `num_oldest` that came first), after the copies."""
        by_age = sorted((each.sequence for each in self.scheduled), key=lambda sequence: sequence.id)
        oldest = set(by_age[:num_oldest])
        decoding, chunks = (
            [tuple(each for each in rows if (each.sequence in oldest) is is_old) for is_old in (False, True)]
            for rows in (self.decoding, self.chunks)
        )
        return SchedulerOutput((), decoding[0], chunks[0]), SchedulerOutput((), decoding[1], chunks[1])


@dataclass
class SchedulerCounters:
    """Monotonic counts since the start."""

    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Scheduler:
    """Owns the waiting and the running sequences and the cache's blocks."""

    def __init__(
        self, max_sequences: int, max_batch_tokens: int, kv_tokens: int, min_prompt_rows: int = MIN_PROMPT_ROWS
    ) -> None:
        self.max_sequences = max_sequences
        self.pacer = PrefillPacer(max_batch_tokens, min_prompt_rows)
        self.blocks = BlockManager(kv_tokens // BLOCK)
        self.counters = SchedulerCounters()
        self.waiting: list[SequenceState] = []  # the first to be admitted first
        self.running: list[SequenceState] = []
        self._num_waiting_rows = 0
        self._copies: list[BlockCopy] = []  # of the step

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache holds."""
        return self.blocks.num_blocks * BLOCK

    def add(self, sequence: SequenceState) -> None:
        insort(self.waiting, sequence, key=_seniority)
        self._num_waiting_rows += len(sequence.token_ids)

    def has_work(self) -> bool:
        """Whether a step may compute something."""
        return any(not s.is_paused for s in self.running) or any(not s.is_paused for s in self.waiting)

    def schedule(self) -> SchedulerOutput:
        """The next step. It is empty if there is nothing to compute."""
        self._copies = []
        decoding = self._decode_rows()
        self._admit_waiting()
        scheduled = {row.sequence for row in decoding}
        prefilling = [s for s in self.running if s not in scheduled and not s.is_paused]
        backlog = sum(s.num_uncomputed for s in prefilling) + self._num_waiting_rows
        chunks = self._prompt_chunks(prefilling, self.pacer.num_prompt_rows(len(decoding), backlog))
        return SchedulerOutput(tuple(self._copies), tuple(decoding), tuple(chunks))

    def computed(self, scheduled: ScheduledSequence) -> None:
        """Record that these rows are in the cache. Call before the sampled token is appended."""
        self.advance(scheduled.sequence, scheduled.num_rows)

    def advance(self, sequence: SequenceState, num_rows: int) -> None:
        """So many more rows of a sequence are in the cache: those of a step, or a draft token that was accepted."""
        since = sequence.num_computed
        sequence.num_computed += num_rows
        if since // BLOCK == sequence.num_computed // BLOCK or sequence.pooled is not None:
            return
        self.blocks.register(sequence)
        self.blocks.computed(sequence, since)

    def finish(self, sequence: SequenceState, keep_prefix: bool = True) -> None:
        """Remove a sequence in any state. What was computed for it can be reused until its blocks are needed."""
        if sequence.state == "finished":
            return
        if sequence.state == "waiting":
            self._leave_waiting(sequence)
        else:
            self.running.remove(sequence)
            self.blocks.release(sequence, keep_prefix)
        sequence.state = "finished"

    def _decode_rows(self) -> list[ScheduledSequence]:
        rows: list[ScheduledSequence] = []
        for sequence in sorted(self.running, key=_seniority):
            is_decoding = sequence.state == "running" and not sequence.is_prefilling and sequence.num_computed > 0
            if not is_decoding or sequence.is_paused:
                continue
            if self._reserve(sequence):
                rows.append(ScheduledSequence(sequence, 1))
        return [replace(row, draft=_draft(row.sequence)) for row in rows] if len(rows) <= MAX_DECODING else rows

    def _prompt_chunks(self, prefilling: list[SequenceState], budget: int) -> list[ScheduledSequence]:
        """Half of the budget to the oldest prompt, the rest to the shortest ones: a long prompt neither starves nor
        delays a short one."""
        if not prefilling or budget <= 0:
            return []
        rows: dict[SequenceState, int] = {}
        oldest = min(prefilling, key=_seniority)
        left = budget
        for sequence, limit in [(oldest, left - left // 2), *((s, left) for s in sorted(prefilling, key=_remaining))]:
            taken = min(limit, left, sequence.num_uncomputed - rows.get(sequence, 0))
            if taken > 0:
                rows[sequence] = rows.get(sequence, 0) + taken
                left -= taken
        # tokens that attend to each other both ways cannot be split, whatever the budget is
        return [ScheduledSequence(s, max(count, s.num_two_way - s.num_computed)) for s, count in rows.items()]

    def _admit_waiting(self) -> None:
        """Admit the first of those that wait, until one does not fit. Who waits for another's prefix costs one look."""
        for sequence in list(self.waiting):
            if len(self.running) >= self.max_sequences:
                return
            if sequence.is_paused:
                continue
            if sequence.awaited is not None and self.blocks.is_pending(sequence.awaited):
                continue  # a running sequence is about to compute the same beginning
            # the hidden states of a pooled text are all needed, and reused tokens would have none
            match = self.blocks.find(sequence) if sequence.pooled is None else self.blocks.trained_match()
            sequence.awaited = match.pending
            if match.pending is None and not self._admit(sequence, match):
                return

    def _admit(self, sequence: SequenceState, match: PrefixMatch) -> bool:
        """Give a waiting sequence its blocks, the first of which hold the prefix; False while too few are free."""
        num_tokens = len(sequence.token_ids) + 1
        needed = num_blocks_for(num_tokens) - self.blocks.num_reusable(match)
        # one more for each running sequence, or the next decode steps would preempt what was just admitted
        if self.blocks.num_free < needed + len(self.running):
            return False
        copy = self.blocks.take(sequence, match, num_tokens)
        if copy is not None:
            self._copies.append(copy)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed - sequence.num_trained
            self.counters.prompt_tokens += sequence.num_prompt_tokens - sequence.num_trained
            self.counters.cached_tokens += sequence.num_cached_tokens
        self._leave_waiting(sequence)
        self.running.append(sequence)
        sequence.state = "running"
        if sequence.pooled is None:
            self.blocks.register(sequence)
        return True

    def _leave_waiting(self, sequence: SequenceState) -> None:
        self.waiting.remove(sequence)
        self._num_waiting_rows -= len(sequence.token_ids)

    def _reserve(self, sequence: SequenceState) -> bool:
        """Blocks for all of a running sequence's tokens, preempting younger sequences if needed; False if it was itself
        the youngest."""
        while not self.blocks.extend(sequence, len(sequence.token_ids)):
            youngest = max(self.running, key=_seniority)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def restart(self, copies: tuple[BlockCopy, ...]) -> None:
        """These copies failed: the sequences that begin with them are computed from the start."""
        targets = {copy.target for copy in copies}
        for sequence in [each for each in self.running if not targets.isdisjoint(each.blocks)]:
            self._preempt(sequence, keep_prefix=False)

    def _preempt(self, sequence: SequenceState, keep_prefix: bool = True) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence, keep_prefix)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        sequence.state = "waiting"
        self.counters.preemptions += 1
        self.add(sequence)


class PrefillPacer:
    """Estimates what a step costs by itself and what each row adds, and limits the prompt rows beside decoding ones:
    p99 of the time per token stays below three times its median while long prompts arrive."""

    def __init__(self, max_rows: int, min_prompt_rows: int = MIN_PROMPT_ROWS) -> None:
        self._max_rows, self._min_prompt_rows = max_rows, min_prompt_rows
        self._step_seconds: float | None = None  # of a step without rows: the weights are read once
        self._row_seconds: float | None = None

    def num_prompt_rows(self, num_decoding: int, backlog: int = 0) -> int:
        """How many prompt rows the next step may have beside `num_decoding` rows.

        backlog: rows of prompts that are not computed yet. With a long backlog every step has prompt rows anyway, and
        all answers become slower alike.
        """
        free = self._max_rows - num_decoding
        if not num_decoding or self._step_seconds is None or not self._row_seconds:
            return free
        decode_seconds = self._step_seconds + num_decoding * self._row_seconds
        stretch = STRETCH * min(max(1.0, backlog / BACKLOG), MAX_STRETCH_FACTOR)
        return min(free, max(self._min_prompt_rows, int(stretch * decode_seconds / self._row_seconds)))

    def observe(self, num_decoding: int, num_prompt_rows: int, seconds: float) -> None:
        """The rows and the duration of the last step."""
        rows, least = num_decoding + num_prompt_rows, MIN_SHARE * seconds
        if num_prompt_rows:
            self._row_seconds = _average(self._row_seconds, max(seconds - (self._step_seconds or 0), least) / rows)
        elif num_decoding:
            known = num_decoding * (self._row_seconds or 0)
            self._step_seconds = _average(self._step_seconds, max(seconds - known, least))


def least_prompt_rows(device_type: str) -> int:
    """Of a step with prompts beside decoding rows."""
    return GPU_MIN_PROMPT_ROWS if device_type == "cuda" else MIN_PROMPT_ROWS


def _average(known: float | None, new: float) -> float:
    return new if known is None else MEMORY * known + (1 - MEMORY) * new


def _draft(sequence: SequenceState) -> tuple[int, ...]:
    """Draft tokens, no more than the sequence's blocks hold and its answer may still have."""
    if not can_speculate(sequence):
        return ()
    if sequence.lookup is None:
        sequence.lookup = PromptLookup()
    num_left = sequence.sampling.max_tokens - sequence.num_generated - 1  # beside the token that is sampled anyway
    num_free = len(sequence.blocks) * BLOCK - len(sequence.token_ids)
    return sequence.lookup.propose(sequence.token_ids, max(0, min(num_left, num_free)))


def can_speculate(sequence: SequenceState) -> bool:
    """Whether the next token is always the most likely one, whatever the tokens before it were."""
    sampling = sequence.sampling
    if sampling.temperature > 0 or sequence.mask is not None:
        return False
    has_penalty = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
    return not (has_penalty or sampling.logit_bias or sampling.min_tokens)


def _seniority(sequence: SequenceState) -> tuple[int, int]:
    return sequence.priority, sequence.id


def _remaining(sequence: SequenceState) -> tuple[int, int]:
    return sequence.num_uncomputed, sequence.id
