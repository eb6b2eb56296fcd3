"""Which rows go through the network next, and which places of the cache they use. Pure policy: no torch, no clock.

A step carries one row of every running answer and fills the rest of its budget with chunks of prompts. First come,
first served within a priority. When the cache is full, idle prefixes go first, then the youngest sequence is preempted:
it gives up its places and is computed again later, with the same tokens as outcome.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from serving.engine.native.kv_cache import BLOCK, GRANULE, Move, PrefixIndex, PrefixMatch, SlotAllocator, round_up
from serving.engine.native.prefill_pacing import PrefillPacer
from serving.engine.native.prompt_lookup import MAX_DECODING, PromptLookup, can_guess
from serving.engine.native.sequence import SequenceState, SlotRange


@dataclass(frozen=True)
class ScheduledSequence:
    """The next `num_rows` uncomputed tokens of a sequence, and a guess at what follows them."""

    sequence: SequenceState
    num_rows: int
    draft: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether a token can be sampled after these rows."""
        return self.num_rows == self.sequence.num_uncomputed


@dataclass(frozen=True)
class SchedulerOutput:
    """Cache moves to carry out in order, then the rows of one forward pass."""

    moves: tuple[Move, ...]
    decoding: tuple[ScheduledSequence, ...]  # one row each, and the rows of its draft
    chunks: tuple[ScheduledSequence, ...]  # of prompts

    @property
    def work(self) -> tuple[ScheduledSequence, ...]:
        """All rows, in the order of the forward pass."""
        return self.decoding + self.chunks

    @property
    def num_prompt_rows(self) -> int:
        return sum(work.num_rows for work in self.chunks)


@dataclass
class SchedulerCounters:
    """Monotonic counts since the start."""

    preemptions: int = 0
    evictions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Scheduler:
    """Owns the waiting, running and idle (finished, kept for their prefix) sequences and the token space."""

    def __init__(self, max_sequences: int, max_batch_tokens: int, kv_tokens: int) -> None:
        self.max_sequences = max_sequences
        self.pacer = PrefillPacer(max_batch_tokens)
        self.space = SlotAllocator(kv_tokens)
        self.counters = SchedulerCounters()
        self.waiting: list[SequenceState] = []
        self.running: list[SequenceState] = []
        self._idle: dict[SequenceState, None] = {}  # least recently used first
        self._prefixes = PrefixIndex()
        self._moves: list[Move] = []

    @property
    def num_idle_tokens(self) -> int:
        """Places held by finished sequences; they are free for the asking. Other threads may ask, for a snapshot."""
        extents = [sequence.extent for sequence in list(self._idle)]
        return sum(extent.capacity for extent in extents if extent is not None)

    def add(self, sequence: SequenceState) -> None:
        self.waiting.append(sequence)
        self.waiting.sort(key=_seniority)

    def has_work(self) -> bool:
        """Whether a step may bring something forward."""
        return any(not s.is_paused for s in self.running) or any(not s.is_paused for s in self.waiting)

    def schedule(self) -> SchedulerOutput:
        """Plan the next step. Empty work means that there is nothing to do."""
        self._moves = []
        decoding = self._decode_rows()
        self._admit_waiting()
        busy = {work.sequence for work in decoding}
        prefilling = [s for s in self.running if s not in busy and not s.is_paused]
        backlog = sum(s.num_uncomputed for s in (*prefilling, *self.waiting))
        chunks = self._prompt_chunks(prefilling, self.pacer.num_prompt_rows(len(decoding), backlog))
        return SchedulerOutput(tuple(self._moves), tuple(decoding), tuple(chunks))

    def computed(self, work: ScheduledSequence) -> None:
        """Record that the rows of `work` are in the cache. Call before the sampled token is appended.

        Rows of a draft are not counted: whoever accepts a guessed token adds one to `num_computed`.
        """
        work.sequence.num_computed += work.num_rows

    def finish(self, sequence: SequenceState, keep_prefix: bool = True) -> None:
        """Take a sequence out, wherever it is; what was computed for it stays findable until its places are needed."""
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
        """The cache's content is lost: everything running starts again, nothing idle can be used."""
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
        return [replace(work, draft=_draft(work.sequence)) for work in rows] if len(rows) <= MAX_DECODING else rows

    def _prompt_chunks(self, prefilling: list[SequenceState], budget: int) -> list[ScheduledSequence]:
        """Half of the budget to the oldest prompt, the rest to the shortest ones: a long prompt neither starves nor
        holds up a short one."""
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
        # tokens that see each other both ways cannot be split, whatever the budget says
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
        """Give a waiting sequence its places and whatever prefix exists; False if there is no room yet."""
        num_tokens = round_up(len(sequence.token_ids) + 1)
        headroom = GRANULE * len(self.running)  # or the next decode steps would preempt what was just admitted
        if self.space.num_free + self.num_idle_tokens < num_tokens + headroom:
            return False
        owner = match.owner if match else None
        if match and owner in self._idle and match.num_ready * 4 >= 3 * match.owner.num_computed:
            sequence.num_computed = match.num_ready
            sequence.extent = self._take_over(match.owner, match.num_ready)
            self._make_room(sequence, num_tokens)
        else:
            sequence.extent = self._allocate(num_tokens, keep=owner)
            if match and match.owner.extent:
                sequence.num_computed = match.num_ready
                self._moves.append(Move(match.owner.extent.start, sequence.extent.start, match.num_ready))
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
        """Places for all of a running sequence's tokens, preempting younger ones if need be; False if it was itself
        the youngest."""
        num_tokens = len(sequence.token_ids)
        while (missing := round_up(num_tokens) - _extent(sequence).capacity) > 0:
            if self.space.num_free + self.num_idle_tokens >= missing:
                self._make_room(sequence, num_tokens)
                continue
            youngest = max(self.running, key=_seniority)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _make_room(self, sequence: SequenceState, num_tokens: int) -> None:
        """Grow an extent in place, or move it, or rearrange the cache. There is room enough, counting idle places."""
        extent = _extent(sequence)
        missing = round_up(num_tokens) - extent.capacity
        while not self.space.grow(extent, num_tokens):
            moved = self.space.allocate(num_tokens)
            if moved is not None:
                self._moves.append(Move(extent.start, moved.start, sequence.num_computed))
                self.space.free(extent)
                sequence.extent = moved
                return
            if self.space.num_free >= missing:
                self._moves += self.space.rearrange(self._growing(), extent, missing)
            else:
                self._evict(next(iter(self._idle)))

    def _allocate(self, num_tokens: int, keep: SequenceState | None) -> SlotRange:
        """A new extent; idle prefixes go, oldest first, and `keep` only if nothing else is left."""
        while (extent := self.space.allocate(num_tokens)) is None:
            if self.space.num_free >= num_tokens:
                self._moves += self.space.rearrange(self._growing(), None, num_tokens)
            else:
                self._evict(next((s for s in self._idle if s is not keep), None) or next(iter(self._idle)))
        return extent

    def _growing(self) -> list[SlotRange]:
        return [sequence.extent for sequence in self.running if sequence.extent]

    def _take_over(self, owner: SequenceState, num_tokens: int) -> SlotRange:
        extent = _extent(owner)
        self._prefixes.remove(owner)
        del self._idle[owner]
        owner.extent = None
        self.space.shrink(extent, num_tokens)
        return extent

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
        self.space.shrink(_extent(sequence), sequence.num_computed)
        self._prefixes.add(sequence)
        self._idle[sequence] = None

    def _evict(self, sequence: SequenceState) -> None:
        del self._idle[sequence]
        self._release(sequence)
        self.counters.evictions += 1

    def _release(self, sequence: SequenceState) -> None:
        self._prefixes.remove(sequence)
        self.space.free(_extent(sequence))
        sequence.extent = None


def _draft(sequence: SequenceState) -> tuple[int, ...]:
    """A guess that fits into the sequence's places and into what it may still say."""
    if sequence.mask is not None or not can_guess(sequence.sampling):
        return ()
    if sequence.lookup is None:
        sequence.lookup = PromptLookup()
    left = sequence.sampling.max_tokens - sequence.num_generated - 1  # beside the token that is sampled anyway
    room = _extent(sequence).capacity - len(sequence.token_ids)
    return sequence.lookup.propose(sequence.token_ids, max(0, min(left, room)))


def _seniority(sequence: SequenceState) -> tuple[int, int]:
    return sequence.priority, sequence.id


def _remaining(sequence: SequenceState) -> tuple[int, int]:
    return sequence.num_uncomputed, sequence.id


def _extent(sequence: SequenceState) -> SlotRange:
    assert sequence.extent is not None, "only a running or idle sequence is asked for its places"
    return sequence.extent
