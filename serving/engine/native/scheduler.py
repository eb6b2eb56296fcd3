"""Selects the rows of the next forward pass and assigns KV-cache slots to them. Pure policy: no torch, no clock.

A step has one row for every decoding sequence; the rest of its budget is filled with chunks of prompts. First come,
first served within a priority. When the cache is full, idle prefixes are evicted first, then the youngest sequence is
preempted: it loses its slots and is computed again later, with the same tokens as result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from serving.engine.native.kv_cache import BLOCK, GRANULE, Move, PrefixIndex, PrefixMatch, SlotAllocator, round_up
from serving.engine.native.prompt_lookup import MAX_DECODING, PromptLookup
from serving.engine.native.sequence import SequenceState, SlotRange

STRETCH = 1.5  # a step with prompt rows may take this much longer than one without
MIN_PROMPT_ROWS = 32  # fewer would read all weights for next to nothing
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
    """Cache moves to carry out in order, then the rows of one forward pass."""

    moves: tuple[Move, ...]
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
        """(the rows of the other sequences, the rows of the `num_oldest` that came first), after the moves."""
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
    """Owns the waiting, running and idle (finished, kept for their prefix) sequences and the cache slots."""

    def __init__(self, max_sequences: int, max_batch_tokens: int, kv_tokens: int) -> None:
        self.max_sequences = max_sequences
        self.pacer = PrefillPacer(max_batch_tokens)
        self.allocator = SlotAllocator(kv_tokens)
        self.counters = SchedulerCounters()
        self.waiting: list[SequenceState] = []
        self.running: list[SequenceState] = []
        self._idle: dict[SequenceState, None] = {}  # least recently used first
        self._prefixes = PrefixIndex()
        self._moves: list[Move] = []

    @property
    def num_idle_tokens(self) -> int:
        """Slots of finished sequences, which can be evicted. Other threads may read it, for a snapshot."""
        ranges = [sequence.slots for sequence in list(self._idle)]
        return sum(slots.capacity for slots in ranges if slots is not None)

    def add(self, sequence: SequenceState) -> None:
        self.waiting.append(sequence)
        self.waiting.sort(key=_seniority)

    def has_work(self) -> bool:
        """Whether a step may compute something."""
        return any(not s.is_paused for s in self.running) or any(not s.is_paused for s in self.waiting)

    def schedule(self) -> SchedulerOutput:
        """The next step. It is empty if there is nothing to compute."""
        self._moves = []
        decoding = self._decode_rows()
        self._admit_waiting()
        scheduled = {row.sequence for row in decoding}
        prefilling = [s for s in self.running if s not in scheduled and not s.is_paused]
        backlog = sum(s.num_uncomputed for s in (*prefilling, *self.waiting))
        chunks = self._prompt_chunks(prefilling, self.pacer.num_prompt_rows(len(decoding), backlog))
        return SchedulerOutput(tuple(self._moves), tuple(decoding), tuple(chunks))

    def computed(self, scheduled: ScheduledSequence) -> None:
        """Record that these rows are in the cache. Call before the sampled token is appended.

        Rows of a draft are not counted: accepting a draft token adds one to `num_computed`.
        """
        scheduled.sequence.num_computed += scheduled.num_rows

    def finish(self, sequence: SequenceState, keep_prefix: bool = True) -> None:
        """Remove a sequence in any state. What was computed for it can be reused until its slots are needed."""
        if sequence.state == "finished":
            return
        if sequence.state == "waiting":
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            if keep_prefix and sequence.pooled is None and sequence.num_computed >= BLOCK:
                self._retain(sequence)
            else:
                self._release(sequence)
        sequence.state = "finished"
        sequence.mask = sequence.lookup = None  # a retained sequence is kept for its cache slots, often for hours

    def forget_cache(self) -> None:
        """The content of the cache is lost: everything running starts again, nothing idle can be reused."""
        for sequence in list(self._idle):
            self._evict(sequence)
        for sequence in list(self.running):
            self._preempt(sequence)

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
        return [ScheduledSequence(s, max(count, s.layout.num_two_way - s.num_computed)) for s, count in rows.items()]

    def _admit_waiting(self) -> None:
        for sequence in list(self.waiting):
            if len(self.running) >= self.max_sequences:
                return
            if sequence.is_paused:
                continue
            # the hidden states of a pooled text are all needed, and reused tokens would have none
            match = self._prefixes.find(sequence) if sequence.pooled is None else None
            if match and match.length - match.num_ready >= BLOCK:
                continue  # a running sequence is about to compute the same beginning: wait for it
            if not self._admit(sequence, match):
                return

    def _admit(self, sequence: SequenceState, match: PrefixMatch | None) -> bool:
        """Give a waiting sequence its slots and the matching prefix; False while too few slots are free."""
        num_tokens = round_up(len(sequence.token_ids) + 1)
        headroom = GRANULE * len(self.running)  # or the next decode steps would preempt what was just admitted
        if self.allocator.num_free + self.num_idle_tokens < num_tokens + headroom:
            return False
        owner = match.owner if match else None
        if match and owner in self._idle and match.num_ready * 4 >= 3 * match.owner.num_computed:
            sequence.num_computed = match.num_ready
            sequence.slots = self._take_over(match.owner, match.num_ready)
            self._grow(sequence, num_tokens)
        else:
            sequence.slots = self._allocate(num_tokens, keep=owner)
            if match and match.owner.slots:
                sequence.num_computed = match.num_ready
                self._moves.append(Move(match.owner.slots.start, sequence.slots.start, match.num_ready))
        if owner in self._idle:
            self._idle[owner] = self._idle.pop(owner)  # now the most recently used
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed
            self.counters.prompt_tokens += sequence.num_prompt_tokens
            self.counters.cached_tokens += sequence.num_computed
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.state = "running"
        if sequence.pooled is None:
            self._prefixes.add(sequence)
        return True

    def _reserve(self, sequence: SequenceState) -> bool:
        """Slots for all of a running sequence's tokens, preempting younger sequences if needed; False if it was itself
        the youngest."""
        num_tokens = len(sequence.token_ids)
        while num_tokens > (capacity := _slots(sequence).capacity):
            if self.allocator.num_free + self.num_idle_tokens >= round_up(num_tokens) - capacity:
                self._grow(sequence, num_tokens)
                continue
            youngest = max(self.running, key=_seniority)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _grow(self, sequence: SequenceState, num_tokens: int) -> None:
        """Grow a range in place, or move it, or rearrange the cache. Enough slots are free or idle."""
        slots = _slots(sequence)
        missing = round_up(num_tokens) - slots.capacity
        while not self.allocator.grow(slots, num_tokens):
            moved = self.allocator.allocate(num_tokens)
            if moved is not None:
                self._moves.append(Move(slots.start, moved.start, sequence.num_computed))
                self.allocator.free(slots)
                sequence.slots = moved
                return
            if self.allocator.num_free >= missing:
                self._moves += self.allocator.rearrange(self._growing(), slots, missing)
            else:
                self._evict(next(iter(self._idle)))

    def _allocate(self, num_tokens: int, keep: SequenceState | None) -> SlotRange:
        """New slots; idle prefixes are evicted, oldest first, and `keep` only if no other is left."""
        while (slots := self.allocator.allocate(num_tokens)) is None:
            if self.allocator.num_free >= num_tokens:
                self._moves += self.allocator.rearrange(self._growing(), None, num_tokens)
            else:
                self._evict(next((s for s in self._idle if s is not keep), None) or next(iter(self._idle)))
        return slots

    def _growing(self) -> list[SlotRange]:
        return [sequence.slots for sequence in self.running if sequence.slots]

    def _take_over(self, owner: SequenceState, num_tokens: int) -> SlotRange:
        slots = _slots(owner)
        self._prefixes.remove(owner)
        del self._idle[owner]
        owner.slots = None
        self.allocator.shrink(slots, num_tokens)
        return slots

    def _preempt(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        sequence.state = "waiting"
        self.counters.preemptions += 1
        self.add(sequence)

    def _retain(self, sequence: SequenceState) -> None:
        self._prefixes.remove(sequence)
        del sequence.token_ids[sequence.num_computed :]
        self.allocator.shrink(_slots(sequence), sequence.num_computed)
        self._prefixes.add(sequence)
        self._idle[sequence] = None

    def _evict(self, sequence: SequenceState) -> None:
        del self._idle[sequence]
        self._release(sequence)

    def _release(self, sequence: SequenceState) -> None:
        self._prefixes.remove(sequence)
        self.allocator.free(_slots(sequence))
        sequence.slots = None


class PrefillPacer:
    """Estimates what a step costs by itself and what each row adds, and limits the prompt rows beside decoding ones:
    p99 of the time per token stays below three times its median while long prompts arrive."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
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
        return min(free, max(MIN_PROMPT_ROWS, int(stretch * decode_seconds / self._row_seconds)))

    def observe(self, num_decoding: int, num_prompt_rows: int, seconds: float) -> None:
        """The rows and the duration of the last step."""
        rows, least = num_decoding + num_prompt_rows, MIN_SHARE * seconds
        if num_prompt_rows:
            self._row_seconds = _average(self._row_seconds, max(seconds - (self._step_seconds or 0), least) / rows)
        elif num_decoding:
            known = num_decoding * (self._row_seconds or 0)
            self._step_seconds = _average(self._step_seconds, max(seconds - known, least))


def _average(known: float | None, new: float) -> float:
    return new if known is None else MEMORY * known + (1 - MEMORY) * new


def _draft(sequence: SequenceState) -> tuple[int, ...]:
    """Draft tokens, no more than the sequence's slots hold and its answer may still have."""
    if not can_speculate(sequence):
        return ()
    if sequence.lookup is None:
        sequence.lookup = PromptLookup()
    num_left = sequence.sampling.max_tokens - sequence.num_generated - 1  # beside the token that is sampled anyway
    num_free = _slots(sequence).capacity - len(sequence.token_ids)
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


def _slots(sequence: SequenceState) -> SlotRange:
    assert sequence.slots is not None, "only running and idle sequences have slots"
    return sequence.slots
