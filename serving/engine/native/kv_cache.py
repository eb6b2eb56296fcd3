"""Where keys and values lie: extents of one token space, and which computed prefixes can be used again. Integers only.

Every sequence owns one contiguous extent, because attention over contiguous memory needs no gather and no special
kernel. Extents grow in place when the next places are free and move otherwise; moving is cheap (28 KiB a token in
ChatGLM2-6B). Memory is held by tokens that exist, rounded up to GRANULE.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from serving.engine.native.sequence import SequenceState, SlotRange

GRANULE = 32  # extents are multiples of this many tokens
BLOCK = 16  # prefixes are found in steps of this many tokens
MAX_CANDIDATES = 8  # of the sequences that share as many blocks, this many are compared token by token


@dataclass(frozen=True)
class Move:
    """Copy `length` tokens' keys and values from place `source` to place `target` (they may overlap)."""

    source: int
    target: int
    length: int


def round_up(num_tokens: int) -> int:
    return -(-num_tokens // GRANULE) * GRANULE


class SlotAllocator:
    """Allocates extents out of `size` places. Never overlapping, exactly accounted."""

    def __init__(self, size: int) -> None:
        self.size = size // GRANULE * GRANULE
        self._extents: list[SlotRange] = []  # by start

    @property
    def num_used(self) -> int:
        return sum(extent.capacity for extent in self._extents)

    @property
    def num_free(self) -> int:
        return self.size - self.num_used

    def _gaps(self) -> Iterator[tuple[int, int, int]]:
        """(index to insert at, start, length) of every free gap."""
        start = 0
        for index, extent in enumerate(self._extents):
            if extent.start > start:
                yield index, start, extent.start - start
            start = extent.start + extent.capacity
        if start < self.size:
            yield len(self._extents), start, self.size - start

    def allocate(self, num_tokens: int) -> SlotRange | None:
        """An extent of at least `num_tokens` amid the largest gap, so that it and its neighbour can grow; or None."""
        wanted = round_up(max(num_tokens, 1))
        index, start, length = max(self._gaps(), key=lambda gap: gap[2], default=(0, 0, 0))
        if length < wanted:
            return None
        if start > 0:
            start += (length - wanted) // 2 // GRANULE * GRANULE
        extent = SlotRange(start, wanted)
        self._extents.insert(index, extent)
        return extent

    def grow(self, extent: SlotRange, num_tokens: int) -> bool:
        """Make room for `num_tokens` in place; False if the neighbour is in the way."""
        wanted = round_up(num_tokens)
        if wanted <= extent.capacity:
            return True
        index = self._extents.index(extent)
        limit = self._extents[index + 1].start if index + 1 < len(self._extents) else self.size
        if extent.start + wanted > limit:
            return False
        extent.capacity = wanted
        return True

    def shrink(self, extent: SlotRange, num_tokens: int) -> None:
        """Give back everything behind the first `num_tokens`."""
        extent.capacity = min(extent.capacity, round_up(max(num_tokens, 1)))

    def free(self, extent: SlotRange) -> None:
        self._extents.remove(extent)

    def rearrange(self, growing: Collection[SlotRange], after: SlotRange | None, wanted: int) -> list[Move]:
        """Close the gaps: `wanted` places become free behind `after` (None: at the end), and what remains is shared
        out behind the `growing` extents. The moves must be carried out in this order. `wanted` must be free in all."""
        spare = self.num_free - round_up(wanted)
        assert spare >= 0, "the caller made sure that there is room"
        share = spare // max(len(growing), 1) // GRANULE * GRANULE
        targets: list[tuple[SlotRange, int]] = []
        start = 0
        for extent in self._extents:
            targets.append((extent, start))
            start += extent.capacity + (share if extent in growing else 0)
            start += round_up(wanted) if extent is after else 0
        down = [(extent, target) for extent, target in targets if target < extent.start]
        up = [(extent, target) for extent, target in reversed(targets) if target > extent.start]
        moves = [Move(extent.start, target, extent.capacity) for extent, target in (*down, *up)]
        for extent, target in targets:
            extent.start = target
        return moves


@dataclass(frozen=True)
class PrefixMatch:
    """The sequence whose beginning equals a prompt's, and how far; `length` counts tokens not computed yet, too."""

    owner: SequenceState
    length: int

    @property
    def num_ready(self) -> int:
        return min(self.length, self.owner.num_computed)


class PrefixIndex:
    """Finds the sequence that shares the longest beginning with a prompt. Blocks are looked up by chained hashes and
    then compared token by token, so that a hash collision costs time and never a wrong answer."""

    def __init__(self) -> None:
        self._owners: dict[int, dict[SequenceState, None]] = {}  # chained hash of the first k blocks -> who has them
        self._chains: dict[SequenceState, list[int]] = {}

    def add(self, sequence: SequenceState) -> None:
        """Make a sequence's tokens findable; call again when it has more of them."""
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
        """The best match for a waiting sequence: most tokens ready, then most tokens in all. Its last token never
        counts: it has to be computed, to sample after it."""
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
            if (length := _common(sequence, owner, limit)) >= BLOCK
        ]
        return max(matches, key=lambda match: (match.num_ready, match.length), default=None)


def _link(previous: int, token_ids: list[int], block: int) -> int:
    return hash((previous, *token_ids[block * BLOCK : (block + 1) * BLOCK]))


def _common(sequence: SequenceState, owner: SequenceState, limit: int) -> int:
    """Tokens at the beginning that both have, 0 if what was computed for one does not hold for the other."""
    limit = min(limit, len(owner.token_ids))
    ours, theirs = sequence.token_ids, owner.token_ids
    length = limit
    if ours[:limit] != theirs[:limit]:
        length = next(i for i in range(limit) if ours[i] != theirs[i])
    if sequence.layout != owner.layout or length < sequence.layout.num_two_way:
        return 0
    return length
