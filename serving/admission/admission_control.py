"""A client's request -> a permit with its turn in the engine, or a 429 with the time to wait.

Requests in flight are bounded by what the engines run at once plus a queue. Within the queue, clients take turns by
tokens (start-time fair queueing): a client's next request starts where its last one ends in virtual time, so 200
requests of one client do not delay other clients' requests; and no client may take more than a share of the queue.
Limits hold for all workers of the machine together; turns are taken in front of each worker's engine.

A request is admitted twice: with its answers before any work is done for it, and with its tokens once they are counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.admission.client_usage import ClientUsage, Reservation, UsageTable
from serving.admission.rate_limits import TokenBucket, minute_buckets, rate_headers, too_many
from serving.http.errors import APIError

RATE_SECONDS = 30.0  # memory of the completion rates
UNKNOWN_SECONDS = 5.0  # to wait while nothing has ended yet
CLIENT_SHARE = 0.75  # of everything in flight that one client may have
MAX_IDLE_CLIENTS = 4096  # whose turns are remembered; past it those with nothing in flight are forgotten


@dataclass(frozen=True)
class AdmissionLimits:
    """0 means no limit, for the limits of one client."""

    max_queued_requests: int = 256  # answers beyond those that the engines generate at once
    max_queued_tokens: int = 1_000_000  # prompt and answer tokens beyond those that the caches hold
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_concurrent: int = 0  # requests of one client in flight


@dataclass(frozen=True)
class Capacity:
    """What one worker's engine runs at once."""

    max_sequences: int
    kv_tokens: int


@dataclass
class CompletionRate:
    """An exponentially fading average of what ends, per second."""

    amount: float = 0.0
    begun: float | None = None
    updated: float = 0.0

    def add(self, amount: float, now: float) -> None:
        if self.begun is None:
            self.begun = self.updated = now
        self.amount = self.amount * math.exp((self.updated - now) / RATE_SECONDS) + amount
        self.updated = now

    def per_second(self, now: float) -> float:
        """0 while nothing has ended."""
        if self.begun is None:
            return 0.0
        # a young average has seen less than its whole memory
        weight = RATE_SECONDS * (1 - math.exp((self.begun - now - 1.0) / RATE_SECONDS))
        return self.amount * math.exp((self.updated - now) / RATE_SECONDS) / weight


@dataclass
class RefusedWork:
    """What was refused and will come again: it waits like a queue, which empties at the completion rate."""

    amount: float = 0.0
    updated: float = 0.0

    def left(self, per_second: float, now: float) -> float:
        self.amount = max(0.0, self.amount - per_second * (now - self.updated))
        self.updated = now
        return self.amount


@dataclass
class _Client:
    """Its turns in front of this worker's engine."""

    num_requests: int = 0  # in flight
    ends: int = 0  # virtual time at which its last request ends


@dataclass(eq=False)
class Permit:
    """One admitted request. Must be closed when the request is over; closing again has no effect."""

    headers: dict[str, str]
    _admission: Admission
    _client: str
    _capacity: Capacity
    _reservation: Reservation
    _on_close: Callable[[], None]
    priority: int = 0  # for the engine: smaller goes first
    _is_open: bool = True

    def claim(self, num_tokens: int) -> None:
        """The prompt and the longest answers that it may get have so many tokens: take a turn in front of the engine.

        Raises APIError 429 with the seconds to wait, and has closed the permit then.
        """
        try:
            self._reservation, self.priority, self.headers = self._admission.claim(
                self._client, self._reservation, num_tokens, self._capacity
            )
        except APIError:
            self.close(0)
            raise

    def started(self) -> None:
        """The first token came: virtual time has reached this request."""
        self._admission.advance(self.priority)

    def close(self, num_used_tokens: int | None) -> None:
        """num_used_tokens: prompt and answer together; None if it is not known, because the client left."""
        if self._is_open:
            self._is_open = False
            self._on_close()
            used = self._reservation.num_tokens if num_used_tokens is None else num_used_tokens
            self._admission.release(self._client, self._reservation, used)


@dataclass(eq=False)
class Admission:
    """Admission control of one worker. For one event loop."""

    limits: AdmissionLimits = field(default_factory=AdmissionLimits)
    clock: Callable[[], float] = time.monotonic  # the same for all workers
    usage_table: UsageTable = field(default_factory=UsageTable)
    num_answers: int = 0  # in flight in this worker
    _virtual_time: int = 0
    _forget_at: int = MAX_IDLE_CLIENTS
    _clients: dict[str, _Client] = field(default_factory=dict[str, _Client])
    _answer_rate: CompletionRate = field(default_factory=CompletionRate)
    _token_rate: CompletionRate = field(default_factory=CompletionRate)
    _refused: RefusedWork = field(default_factory=RefusedWork)  # answers

    def admit(
        self, name: str, num_answers: int, capacity: Capacity, on_close: Callable[[], None] = lambda: None
    ) -> Permit:
        """Before a request is tokenized. name: the client's. on_close: called once when the request is over.

        Raises APIError 429 with the seconds to wait.
        """
        now = self.clock()
        # reserved before it is checked: two workers that do so at the same instant see each other
        reservation = self.usage_table.reserve(name, num_answers)
        usage = self.usage_table.usage(reservation)
        requests, tokens = self._buckets(usage, now)
        try:
            self._check_concurrency(usage, now)
            requests.check(1)
            tokens.check(1)
            self._check_queue(usage, reservation, capacity, now)
        except APIError:
            self.usage_table.release(reservation)
            raise
        if self.limits.requests_per_minute:
            requests.level -= 1
            self._store(reservation, usage, requests, tokens, now)
        self._count(self._clients.get(name) or self._new_client(name), 1, reservation)
        headers = self._queue_headers(usage, capacity, now) | requests.headers() | tokens.headers()
        return Permit(headers, self, name, capacity, reservation, on_close)

    def claim(
        self, name: str, reservation: Reservation, num_tokens: int, capacity: Capacity
    ) -> tuple[Reservation, int, dict[str, str]]:
        """The same request with its tokens: (its reservation, its turn, response headers). See `Permit.claim`."""
        now = self.clock()
        claimed = self.usage_table.claim(reservation, num_tokens)
        usage = self.usage_table.usage(claimed)
        requests, tokens = self._buckets(usage, now)
        try:
            tokens.check(num_tokens)
            self._check_queue(usage, claimed, capacity, now)
        except APIError:
            self.usage_table.claim(claimed, -num_tokens)
            raise
        if self.limits.tokens_per_minute:
            tokens.level -= num_tokens
            self._store(claimed, usage, requests, tokens, now)
        client = self._clients[name]
        starts = max(self._virtual_time, client.ends)
        client.ends = starts + num_tokens
        headers = self._queue_headers(usage, capacity, now) | requests.headers() | tokens.headers()
        return claimed, starts, headers

    def advance(self, virtual_time: int) -> None:
        """A request that starts at this virtual time has got its first token."""
        self._virtual_time = max(self._virtual_time, virtual_time)

    def release(self, name: str, reservation: Reservation, num_used_tokens: int) -> None:
        """A request is over."""
        now = self.clock()
        self._answer_rate.add(reservation.num_answers, now)
        self._token_rate.add(reservation.num_tokens, now)
        client, num_unused = self._clients[name], reservation.num_tokens - num_used_tokens
        self._count(client, -1, reservation)
        client.ends -= num_unused  # its next turn comes as early as if it had asked for what it used
        if self.limits.tokens_per_minute:
            usage = self.usage_table.usage(reservation)
            requests, tokens = self._buckets(usage, now)
            tokens.level += num_unused
            self._store(reservation, usage, requests, tokens, now)
        self.usage_table.release(reservation)

    def _count(self, client: _Client, sign: int, reservation: Reservation) -> None:
        self.num_answers += sign * reservation.num_answers
        client.num_requests += sign

    def _buckets(self, usage: ClientUsage, now: float) -> tuple[TokenBucket, TokenBucket]:
        return minute_buckets(self.limits.requests_per_minute, self.limits.tokens_per_minute, usage, now)

    def _store(
        self, reservation: Reservation, usage: ClientUsage, requests: TokenBucket, tokens: TokenBucket, now: float
    ) -> None:
        # later than what it was computed from, even where the clock has not moved
        at = now if usage.at is None else max(now, math.nextafter(usage.at, math.inf))
        self.usage_table.store_allowance(reservation, requests.level, tokens.level, at)

    def _check_concurrency(self, usage: ClientUsage, now: float) -> None:
        limit = self.limits.max_concurrent
        if limit and usage.num_requests > limit:
            message = f"Rate limit reached for concurrent requests: Limit {limit}."
            raise too_many(message, "requests", self._seconds(1, 0, now), {})

    def _check_queue(self, usage: ClientUsage, reservation: Reservation, capacity: Capacity, now: float) -> None:
        max_answers, max_tokens = self._bounds(capacity)
        all_answers, all_tokens = self.usage_table.in_flight()
        # a client with nothing else in flight must not be refused for the size of one request
        share = CLIENT_SHARE if usage.num_requests > 1 else 1.0
        excess_answers = max(all_answers - max_answers, usage.num_answers - int(max_answers * share))
        excess_tokens = max(all_tokens - max_tokens, usage.num_tokens - int(max_tokens * share))
        if all_answers == reservation.num_answers or (excess_answers <= 0 and excess_tokens <= 0):
            return  # an idle server takes whatever the engine can take
        # those that were refused before it come again before it; a whole queue of them is refused once more
        ahead = self._refused.left(self._answer_rate.per_second(now) * self.usage_table.num_workers, now)
        self._refused.amount = min(ahead + reservation.num_answers, max_answers)
        raise too_many(
            "The server is at its capacity and its queue is full.",
            "requests" if excess_answers > 0 else "tokens",
            self._seconds(max(excess_answers, 0) + int(ahead), excess_tokens, now) or UNKNOWN_SECONDS,
            self._queue_headers(usage, capacity, now),
        )

    def _bounds(self, capacity: Capacity) -> tuple[int, int]:
        """The most answers and tokens in flight, in all workers."""
        limits, num_workers = self.limits, self.usage_table.num_workers
        return (
            num_workers * capacity.max_sequences + limits.max_queued_requests,
            num_workers * capacity.kv_tokens + limits.max_queued_tokens,
        )

    def _seconds(self, num_answers: int, num_tokens: int, now: float) -> float:
        """Until this much has ended, at the present rate, if the other workers are as fast."""
        rates = (self._answer_rate.per_second(now), self._token_rate.per_second(now))
        pairs = zip((num_answers, num_tokens), rates, strict=True)
        alone = max((amount / rate for amount, rate in pairs if amount > 0 and rate > 0), default=0.0)
        return alone / self.usage_table.num_workers

    def _queue_headers(self, usage: ClientUsage, capacity: Capacity, now: float) -> dict[str, str]:
        all_answers, all_tokens = self.usage_table.in_flight()
        answers, tokens = (int(bound * CLIENT_SHARE) for bound in self._bounds(capacity))
        return rate_headers(
            "requests", answers, answers - max(usage.num_answers, all_answers - answers // 3),
            self._seconds(all_answers, 0, now),
        ) | rate_headers(
            "tokens", tokens, tokens - max(usage.num_tokens, all_tokens - tokens // 3),
            self._seconds(0, all_tokens, now),
        )  # fmt: skip

    def _new_client(self, name: str) -> _Client:
        if len(self._clients) >= self._forget_at:
            for idle in [name for name, client in self._clients.items() if not client.num_requests]:
                del self._clients[idle]
            self._forget_at = max(MAX_IDLE_CLIENTS, 2 * len(self._clients))
        client = self._clients[name] = _Client()
        return client
