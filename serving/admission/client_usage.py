"""What each client holds and has left, counted over all workers of one machine. Knows names and numbers, no limits.

Every worker writes a page of its own and reads the others': nobody waits for a lock, so a worker that is stopped or
killed in the middle holds nobody up. A page belongs to whoever has locked its file; the kernel unlocks it when the
process ends, in whatever way, and what it held counts no longer.

Whoever asks for room takes it first and looks afterwards, so two workers that do so at the same instant see each other.
The allowance of a minute is what the page with the latest entry says: of two spendings within the same microseconds one
may be forgotten.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

NUM_PLACES = 16_384  # for clients, in a page
NUM_PROBES = 8  # places that one client may have

_HEAD = struct.Struct("=qq48x")  # answers and tokens in flight
_ENTRY = struct.Struct("=Qdddiiq")  # key, requests left, tokens left, when; requests, answers, tokens in flight
_HELD = struct.Struct("=iiq")
_LEFT = struct.Struct("=ddd")
_LEFT_AT, _HELD_AT = 8, 32
PAGE_BYTES = _HEAD.size + (NUM_PLACES + NUM_PROBES) * _ENTRY.size


@dataclass(frozen=True)
class Reservation:
    """What one request holds, where it is written."""

    key: int
    place: int | None  # None: nobody else's place was free, so the client is not told apart
    num_answers: int
    num_tokens: int


@dataclass(frozen=True)
class ClientUsage:
    """Of one client, over all workers."""

    num_requests: int  # in flight
    num_answers: int
    num_tokens: int
    requests_left: float  # of the minute, at the time `at`
    tokens_left: float
    at: float | None  # None: nothing was spent within memory


class UsageTable:
    """One worker's view of everybody's pages. For one thread; opened at the first use, in the process that serves.

    folder: where the workers' pages are; None is this process alone. num_pages: twice the workers, so that whoever
    comes finds a free one.
    """

    def __init__(self, folder: Path | None = None, num_pages: int = 1) -> None:
        self._folder = folder
        self._num_pages = num_pages
        self._living: list[mmap.mmap] = []  # other workers' pages
        self._dead: list[mmap.mmap] = []  # what was spent there still counts

    def hold(self, name: str, num_answers: int, num_tokens: int) -> Reservation:
        """Write down one more request of this client."""
        key = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") or 1
        hold = Reservation(key, _place_of(self._own, key), num_answers, num_tokens)
        self._count(hold, 1)
        return hold

    def release(self, hold: Reservation) -> None:
        """The request is over. Call once."""
        self._count(hold, -1)

    def standing(self, hold: Reservation) -> ClientUsage:
        """Of the client that this hold belongs to, the hold included."""
        if hold.place is None:
            return ClientUsage(1, hold.num_answers, hold.num_tokens, 0.0, 0.0, None)
        requests = answers = tokens = 0
        latest = (0.0, 0.0, 0.0)
        for page in (self._own, *self._living, *self._dead):
            for entry in _entries(page, hold.key):
                if entry[0] != hold.key:
                    continue
                latest = max(latest, (entry[3], entry[1], entry[2]))
                if page not in self._dead:
                    requests, answers, tokens = requests + entry[4], answers + entry[5], tokens + entry[6]
        at, requests_left, tokens_left = latest
        return ClientUsage(requests, answers, tokens, requests_left, tokens_left, at or None)

    def remember(self, hold: Reservation, requests_left: float, tokens_left: float, at: float) -> None:
        """What this client has left of its minute; replaces what anybody wrote for an earlier time. at: above 0."""
        if hold.place is not None:
            _LEFT.pack_into(self._own, hold.place + _LEFT_AT, requests_left, tokens_left, at)

    def in_flight(self) -> tuple[int, int]:
        """Answers and tokens of everybody, in all workers."""
        pairs = [_HEAD.unpack_from(page) for page in (self._own, *self._living)]
        return sum(answers for answers, _ in pairs), sum(tokens for _, tokens in pairs)

    @property
    def num_workers(self) -> int:
        """Those that live, this one included."""
        return len((self._own, *self._living))

    def look(self) -> None:
        """Notice who has come and who has died. Call every second."""
        own = self._own
        others = [(file, page) for file, page in self._pages if page is not own]
        is_free = [_is_free(file) for file, _ in others]
        self._living = [page for (_, page), free in zip(others, is_free, strict=True) if not free]
        self._dead = [page for (_, page), free in zip(others, is_free, strict=True) if free]

    def close(self) -> None:
        """Give the page back; for tests, since the kernel does it for processes."""
        for file, page in self._pages:
            page.close()
            os.close(file)

    @cached_property
    def _own(self) -> mmap.mmap:
        if self._folder is None:
            return mmap.mmap(-1, PAGE_BYTES)
        for file, page in self._pages:
            if _take(file):
                _forget_holds(page)
                self.__dict__["_own"] = page  # `look` asks for it
                self.look()
                return page
        raise RuntimeError(f"more than {self._num_pages} workers share {self._folder}")

    @cached_property
    def _pages(self) -> list[tuple[int, mmap.mmap]]:
        """(file, its memory), in the same order for every worker."""
        if self._folder is None:
            return []
        files = [
            os.open(self._folder / f"page-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            for number in range(self._num_pages)
        ]
        for file in files:
            os.ftruncate(file, PAGE_BYTES)  # full of holes: what nobody writes takes no room
        return [(file, mmap.mmap(file, PAGE_BYTES)) for file in files]

    def _count(self, hold: Reservation, sign: int) -> None:
        page = self._own
        answers, tokens = _HEAD.unpack_from(page)
        _HEAD.pack_into(page, 0, answers + sign * hold.num_answers, tokens + sign * hold.num_tokens)
        if hold.place is not None:
            at = hold.place + _HELD_AT
            requests, answers, tokens = _HELD.unpack_from(page, at)
            _HELD.pack_into(
                page, at, requests + sign, answers + sign * hold.num_answers, tokens + sign * hold.num_tokens
            )


def _take(file: int) -> bool:
    """Lock it for as long as this process lives; False if somebody else has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_free(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


def _first_place(key: int) -> int:
    """In bytes from the page's beginning."""
    return _HEAD.size + key % NUM_PLACES * _ENTRY.size


def _entries(page: mmap.mmap, key: int) -> Iterator[tuple[int, float, float, float, int, int, int]]:
    """The entries of the places that a client may have."""
    first = _first_place(key)
    return cast("Iterator[Any]", _ENTRY.iter_unpack(page[first : first + NUM_PROBES * _ENTRY.size]))


def _place_of(page: mmap.mmap, key: int) -> int | None:
    """The client's place; if it has none yet, the one that has been of no use for longest. None if all are in use."""
    idle: list[tuple[float, int]] = []
    for number, entry in enumerate(_entries(page, key)):
        place = _first_place(key) + number * _ENTRY.size
        if entry[0] == key:
            return place
        if not entry[4]:
            idle.append((entry[3], place))
    if not idle:
        return None
    place = min(idle)[1]
    _ENTRY.pack_into(page, place, key, 0.0, 0.0, 0.0, 0, 0, 0)
    return place


def _forget_holds(page: mmap.mmap) -> None:
    """Of whoever had this page before and died; what its clients had spent stays."""
    _HEAD.pack_into(page, 0, 0, 0)
    for place in range(_HEAD.size, PAGE_BYTES, _ENTRY.size):
        if _HELD.unpack_from(page, place + _HELD_AT)[0]:
            _HELD.pack_into(page, place + _HELD_AT, 0, 0, 0)
