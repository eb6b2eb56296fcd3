"""A client's name -> what it has in flight and left of its minute, counted over all workers of one machine.

Every worker writes a memory-mapped page of its own and reads the others': there is no lock to wait for, so a worker
that is stopped or killed delays no other. A page belongs to the process that has locked its file; the kernel unlocks it
when the process ends, in whatever way, and its requests in flight count no longer.

The allowance of a minute is that of the page with the latest entry: of two updates within the same microseconds one may
be lost.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

NUM_ENTRIES = 16_384  # of a page: a hash table with open addressing
NUM_PROBES = 8  # entries that one client may use

_HEAD = struct.Struct("=qq48x")  # answers and tokens in flight
_ENTRY = struct.Struct("=Qdddiiq")  # key, requests left, tokens left, when; requests, answers, tokens in flight
_IN_FLIGHT = struct.Struct("=iiq")
_LEFT = struct.Struct("=ddd")
_LEFT_AT, _IN_FLIGHT_AT = 8, 32  # in an entry
PAGE_BYTES = _HEAD.size + (NUM_ENTRIES + NUM_PROBES) * _ENTRY.size


@dataclass(frozen=True)
class Reservation:
    """What one request has reserved."""

    key: int
    entry: int | None  # its offset in this worker's page; None: none was free, so this client is not counted by itself
    num_answers: int
    num_tokens: int


@dataclass(frozen=True)
class ClientUsage:
    """One client's, over all workers."""

    num_requests: int  # in flight, as the next two
    num_answers: int
    num_tokens: int
    requests_left: float  # of the minute, at the time `at`
    tokens_left: float
    at: float | None  # None: no allowance is stored


class UsageTable:
    """One worker's view of all workers' pages. For one thread; opened at the first use, in the process that serves.

    folder: of the workers' pages; None for a single process. num_pages: twice the workers, so that a worker that starts
    finds a free one.
    """

    def __init__(self, folder: Path | None = None, num_pages: int = 1) -> None:
        self._folder = folder
        self._num_pages = num_pages
        self._live_pages: list[mmap.mmap] = []  # of other workers
        self._dead_pages: list[mmap.mmap] = []  # of ended workers; their allowances still count

    def reserve(self, name: str, num_answers: int) -> Reservation:
        """Count one more request of this client, without tokens."""
        key = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") or 1
        reservation = Reservation(key, _find_entry(self._own, key), num_answers, 0)
        self._count(reservation, 1, num_answers, 0)
        return reservation

    def claim(self, reservation: Reservation, num_more_tokens: int) -> Reservation:
        """The same request with so many more tokens; replaces the reservation."""
        self._count(reservation, 0, 0, num_more_tokens)
        return replace(reservation, num_tokens=reservation.num_tokens + num_more_tokens)

    def release(self, reservation: Reservation) -> None:
        """The request is over. Call once."""
        self._count(reservation, -1, -reservation.num_answers, -reservation.num_tokens)

    def usage(self, reservation: Reservation) -> ClientUsage:
        """The usage of this reservation's client, the reservation included."""
        if reservation.entry is None:
            return ClientUsage(1, reservation.num_answers, reservation.num_tokens, 0.0, 0.0, None)
        requests = answers = tokens = 0
        latest = (0.0, 0.0, 0.0)
        for page in (self._own, *self._live_pages, *self._dead_pages):
            for entry in _entries(page, reservation.key):
                if entry[0] != reservation.key:
                    continue
                latest = max(latest, (entry[3], entry[1], entry[2]))
                if page not in self._dead_pages:
                    requests, answers, tokens = requests + entry[4], answers + entry[5], tokens + entry[6]
        at, requests_left, tokens_left = latest
        return ClientUsage(requests, answers, tokens, requests_left, tokens_left, at or None)

    def store_allowance(self, reservation: Reservation, requests_left: float, tokens_left: float, at: float) -> None:
        """What the client has left of its minute; replaces what any worker stored for an earlier time. at: above 0."""
        if reservation.entry is not None:
            _LEFT.pack_into(self._own, reservation.entry + _LEFT_AT, requests_left, tokens_left, at)

    def in_flight(self) -> tuple[int, int]:
        """Answers and tokens of all clients, in all workers."""
        pairs = [_HEAD.unpack_from(page) for page in (self._own, *self._live_pages)]
        return sum(answers for answers, _ in pairs), sum(tokens for _, tokens in pairs)

    @property
    def num_workers(self) -> int:
        """Running workers, this one included."""
        return len((self._own, *self._live_pages))

    def refresh(self) -> None:
        """Find out which workers have started and ended. Call every second."""
        own = self._own
        others = [(file, page) for file, page in self._pages if page is not own]
        is_free = [_is_free(file) for file, _ in others]
        self._live_pages = [page for (_, page), free in zip(others, is_free, strict=True) if not free]
        self._dead_pages = [page for (_, page), free in zip(others, is_free, strict=True) if free]

    def close(self) -> None:
        """Unlock the page; for tests, since the kernel does it when a process ends."""
        for file, page in self._pages:
            page.close()
            os.close(file)

    @cached_property
    def _own(self) -> mmap.mmap:
        if self._folder is None:
            return mmap.mmap(-1, PAGE_BYTES)
        for file, page in self._pages:
            if _lock(file):
                _clear_in_flight(page)
                self.__dict__["_own"] = page  # `refresh` reads it
                self.refresh()
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
            os.posix_fallocate(file, 0, PAGE_BYTES)  # a sparse page would kill the process that finds no room later
        return [(file, mmap.mmap(file, PAGE_BYTES)) for file in files]

    def _count(self, reservation: Reservation, more_requests: int, more_answers: int, more_tokens: int) -> None:
        page = self._own
        answers, tokens = _HEAD.unpack_from(page)
        _HEAD.pack_into(page, 0, answers + more_answers, tokens + more_tokens)
        if reservation.entry is not None:
            at = reservation.entry + _IN_FLIGHT_AT
            requests, answers, tokens = _IN_FLIGHT.unpack_from(page, at)
            _IN_FLIGHT.pack_into(page, at, requests + more_requests, answers + more_answers, tokens + more_tokens)


def _lock(file: int) -> bool:
    """Lock it for as long as this process runs; False if another process has."""
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


def _first_entry(key: int) -> int:
    """Its offset in the page."""
    return _HEAD.size + key % NUM_ENTRIES * _ENTRY.size


def _entries(page: mmap.mmap, key: int) -> Iterator[tuple[int, float, float, float, int, int, int]]:
    """The entries that a client may use."""
    first = _first_entry(key)
    return cast("Iterator[Any]", _ENTRY.iter_unpack(page[first : first + NUM_PROBES * _ENTRY.size]))


def _find_entry(page: mmap.mmap, key: int) -> int | None:
    """The offset of the client's entry, which may replace the least recently used idle one. None if none is idle."""
    idle: list[tuple[float, int]] = []
    for number, entry in enumerate(_entries(page, key)):
        offset = _first_entry(key) + number * _ENTRY.size
        if entry[0] == key:
            return offset
        if not entry[4]:
            idle.append((entry[3], offset))
    if not idle:
        return None
    offset = min(idle)[1]
    _ENTRY.pack_into(page, offset, key, 0.0, 0.0, 0.0, 0, 0, 0)
    return offset


def _clear_in_flight(page: mmap.mmap) -> None:
    """Of the ended worker that had this page; its clients' allowances stay."""
    _HEAD.pack_into(page, 0, 0, 0)
    for offset in range(_HEAD.size, PAGE_BYTES, _ENTRY.size):
        if _IN_FLIGHT.unpack_from(page, offset + _IN_FLIGHT_AT)[0]:
            _IN_FLIGHT.pack_into(page, offset + _IN_FLIGHT_AT, 0, 0, 0)
