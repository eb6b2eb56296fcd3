"""Sequences -> their KV-cache slots, and the sequence whose computed beginning a new prompt can reuse. Integers only.

Every sequence has one contiguous range of slots, because attention over contiguous memory needs no gather and no
special kernel. Ranges grow in place where the next slots are free and move otherwise (28 KiB a token in ChatGLM2-6B).
A range holds the sequence's tokens, rounded up to GRANULE.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from serving.engine.native.sequence import SequenceState, SlotRange

GRANULE = 32  # ranges are multiples of this many slots
BLOCK = 16  # prefixes are found in steps of this many tokens
MAX_CANDIDATES = 8  # of the sequences that share as many blocks, this many are compared token by token


@dataclass(frozen=True)
class Move:
    """Copy the keys and values of `length` slots from `source` to `target` (they may overlap)."""

    source: int
    target: int
    length: int


def round_up(num_tokens: int) -> int:
    return -(-num_tokens // GRANULE) * GRANULE


class SlotAllocator:
    """Allocates ranges out of `size` slots; they never overlap."""

    def __init__(self, size: int) -> None:
        self.size = size // GRANULE * GRANULE
        self._ranges: list[SlotRange] = []  # by start

    @property
    def num_used(self) -> int:
        return sum(slots.capacity for slots in self._ranges)

    @property
    def num_free(self) -> int:
        return self.size - self.num_used

    def _gaps(self) -> Iterator[tuple[int, int, int]]:
        """(index to insert at, start, length) of every free gap."""
        start = 0
        for index, slots in enumerate(self._ranges):
            if slots.start > start:
                yield index, start, slots.start - start
            start = slots.start + slots.capacity
        if start < self.size:
            yield len(self._ranges), start, self.size - start

    def allocate(self, num_tokens: int) -> SlotRange | None:
        """At least `num_tokens` slots amid the largest gap, so that they and their neighbour can grow; or None."""
        wanted = round_up(max(num_tokens, 1))
        index, start, length = max(self._gaps(), key=lambda gap: gap[2], default=(0, 0, 0))
        if length < wanted:
            return None
        if start > 0:
            start += (length - wanted) // 2 // GRANULE * GRANULE
        slots = SlotRange(start, wanted)
        self._ranges.insert(index, slots)
        return slots

    def grow(self, slots: SlotRange, num_tokens: int) -> bool:
        """Extend to `num_tokens` slots in place; False if the next range is in the way."""
        wanted = round_up(num_tokens)
        if wanted <= slots.capacity:
            return True
        index = self._ranges.index(slots)
        limit = self._ranges[index + 1].start if index + 1 < len(self._ranges) else self.size
        if slots.start + wanted > limit:
            return False
        slots.capacity = wanted
        return True

    def shrink(self, slots: SlotRange, num_tokens: int) -> None:
        """Free everything behind the first `num_tokens`."""
        slots.capacity = min(slots.capacity, round_up(max(num_tokens, 1)))

    def free(self, slots: SlotRange) -> None:
        self._ranges.remove(slots)

    def rearrange(self, growing: Collection[SlotRange], after: SlotRange | None, wanted: int) -> list[Move]:
        """Close the gaps: `wanted` slots become free behind `after` (None: at the end), and the other free slots are
        divided among the `growing` ranges, behind each. The moves must be carried out in this order.

        At least `wanted` slots must be free in total.
        """
        spare = self.num_free - round_up(wanted)
        assert spare >= 0, "the caller made sure that enough slots are free"
        share = spare // max(len(growing), 1) // GRANULE * GRANULE
        targets: list[tuple[SlotRange, int]] = []
        start = 0
        for slots in self._ranges:
            targets.append((slots, start))
            start += slots.capacity + (share if slots in growing else 0)
            start += round_up(wanted) if slots is after else 0
        down = [(slots, target) for slots, target in targets if target < slots.start]
        up = [(slots, target) for slots, target in reversed(targets) if target > slots.start]
        moves = [Move(slots.start, target, slots.capacity) for slots, target in (*down, *up)]
        for slots, target in targets:
            slots.start = target
        return moves


@dataclass(frozen=True)
class PrefixMatch:
    """The sequence that shares its first `length` tokens with a prompt, including those it has not computed yet."""

    owner: SequenceState
    length: int

    @property
    def num_ready(self) -> int:
        return min(self.length, self.owner.num_computed)


class PrefixIndex:
    """Finds the sequence that shares the longest beginning with a prompt. Blocks are looked up by chained hashes and
    then compared token by token, so that a hash collision costs time and never a wrong answer."""

    def __init__(self) -> None:
        self._owners: dict[int, dict[SequenceState, None]] = {}  # chained hash of the first k blocks -> the sequences
        self._chains: dict[SequenceState, list[int]] = {}

    def add(self, sequence: SequenceState) -> None:
        """Index a sequence's tokens; call again when it has more of them."""
        chain = self._chains.setdefault(sequence, [])
        for index in range(len(chain), len(sequence.token_ids) // BLOCK):
            link = _link(chain[-1] if chain else 0, sequence.token_ids, index)
            chain.append(link)
            self._owners.setdefault(link, {})[sequence] = None

    def remove(self, sequence: SequenceState) -> None:
        for link in self._chains.pop(sequence, ()):
            owners = self._owners[link]
            del owners[sequence]
            if not owners:
                del self._owners[link]

    def find(self, sequence: SequenceState) -> PrefixMatch | None:
        """The best match for a waiting sequence: most computed tokens, then most tokens. Its last token never counts:
        it has to be computed, to sample after it."""
        limit = len(sequence.token_ids) - 1
        link = 0
        candidates: dict[SequenceState, None] = {}
        for index in range(limit // BLOCK):
            link = _link(link, sequence.token_ids, index)
            owners = self._owners.get(link)
            if not owners:
                break
            candidates = owners
        matches = [
            PrefixMatch(owner, length)
            for owner in list(candidates)[-MAX_CANDIDATES:]
            if (length := _num_shared(sequence, owner, limit)) >= BLOCK
        ]
        return max(matches, key=lambda match: (match.num_ready, match.length), default=None)


def _link(previous: int, token_ids: list[int], block: int) -> int:
    return hash((previous, *token_ids[block * BLOCK : (block + 1) * BLOCK]))


def _num_shared(sequence: SequenceState, owner: SequenceState, limit: int) -> int:
    """Tokens at the beginning that both have; 0 if keys and values of one are not those of the other."""
    limit = min(limit, len(owner.token_ids))
    ours, theirs = sequence.token_ids, owner.token_ids
    length = limit
    if ours[:limit] != theirs[:limit]:
        length = next(i for i in range(limit) if ours[i] != theirs[i])
    if sequence.layout != owner.layout or length < sequence.layout.num_two_way:
        return 0
    return length
