"""Who may come in, in which order, and when to come again. Counts answers and tokens; knows no text and no engine.

In flight is whatever was let in and is not finished. Its bound is what the engine can hold plus a queue. Within the
queue, clients take turns by tokens (start-time fair queueing): a client's next request starts where its last one ends
in virtual time, so 200 requests of one client stand behind each other and not in front of everybody else's; and no
client may fill the queue so far that nobody else gets in. Limits hold for all workers of the machine together; turns
are taken in front of each engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.admission.client_usage import ClientUsage, Reservation, UsageTable
from serving.http.errors import APIError

RATE_SECONDS = 30.0  # memory of the drain rate
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1, 300
OWN_SHARE = 0.75  # of everything in flight that one client may have
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
    """What one worker's engine works on at once."""

    max_sequences: int
    kv_tokens: int


@dataclass
class Rate:
    """An exponentially fading average of what passes, per second."""

    amount: float = 0.0
    begun: float | None = None
    updated: float = 0.0

    def add(self, amount: float, now: float) -> None:
        if self.begun is None:
            self.begun = self.updated = now
        self.amount = self.amount * math.exp((self.updated - now) / RATE_SECONDS) + amount
        self.updated = now

    def per_second(self, now: float) -> float:
        """0 while nothing has passed."""
        if self.begun is None:
            return 0.0
        # a young average has seen less than its whole memory
        weight = RATE_SECONDS * (1 - math.exp((self.begun - now - 1.0) / RATE_SECONDS))
        return self.amount * math.exp((self.updated - now) / RATE_SECONDS) / weight


@dataclass
class Bucket:
    """A token bucket that holds one minute's allowance. per_minute 0: no limit."""

    per_minute: int
    level: float

    def seconds_until(self, amount: float) -> float:
        """How long to wait for this much."""
        return max(0.0, (min(amount, self.per_minute) - self.level) * 60 / self.per_minute)


@dataclass
class _Client:
    """Its turns in front of this worker's engine."""

    num_requests: int = 0  # in flight
    ends: int = 0  # virtual time at which its last request ends


@dataclass(eq=False)
class Permit:
    """One request's permission. Must be closed exactly once when the request is over; a second time does nothing."""

    priority: int  # for the engine: smaller goes first
    headers: dict[str, str]
    _admission: Admission
    _client: str
    _hold: Reservation
    _is_open: bool = True

    def started(self) -> None:
        """The first token came: virtual time has reached this request."""
        self._admission.reach(self.priority)

    def close(self, num_used_tokens: int | None) -> None:
        """num_used_tokens: prompt and answer together; None if it is not known, because the client left."""
        if self._is_open:
            self._is_open = False
            used = self._hold.num_tokens if num_used_tokens is None else num_used_tokens
            self._admission.leave(self._client, self._hold, used)


@dataclass(eq=False)
class Admission:
    """The door of one worker. For one event loop."""

    limits: AdmissionLimits = field(default_factory=AdmissionLimits)
    clock: Callable[[], float] = time.monotonic  # the same for all workers
    accounts: UsageTable = field(default_factory=UsageTable)
    num_answers: int = 0  # in flight in this worker
    num_tokens: int = 0
    _virtual_time: int = 0
    _forget_at: int = MAX_IDLE_CLIENTS
    _clients: dict[str, _Client] = field(default_factory=dict[str, _Client])
    _answer_rate: Rate = field(default_factory=Rate)
    _token_rate: Rate = field(default_factory=Rate)

    def admit(self, name: str, num_answers: int, num_tokens: int, capacity: Capacity) -> Permit:
        """Let a request in. Raises APIError 429 with the seconds to wait.

        name: the client's; num_tokens: the prompt and the longest answers that it may get.
        """
        now = self.clock()
        hold = self.accounts.hold(name, num_answers, num_tokens)
        standing = self.accounts.standing(hold)
        buckets = self._buckets(standing, now)
        try:
            self._check_client(standing, buckets, num_tokens, now)
            self._check_queue(standing, hold, capacity, now)
        except APIError:
            self.accounts.release(hold)
            raise
        if any(bucket.per_minute for bucket in buckets.values()):
            buckets["requests"].level -= 1
            buckets["tokens"].level -= num_tokens
            self._remember(hold, standing, buckets, now)
        client = self._clients.get(name) or self._new_client(name)
        self._count(client, 1, hold)
        starts = max(self._virtual_time, client.ends)
        client.ends = starts + num_tokens
        return Permit(starts, self._headers(standing, buckets, capacity, now), self, name, hold)

    def reach(self, virtual_time: int) -> None:
        """A request that starts at this virtual time has begun to be answered."""
        self._virtual_time = max(self._virtual_time, virtual_time)

    def leave(self, name: str, hold: Reservation, num_used_tokens: int) -> None:
        """A request is over."""
        now = self.clock()
        self._answer_rate.add(hold.num_answers, now)
        self._token_rate.add(hold.num_tokens, now)
        self._count(self._clients[name], -1, hold)
        if self.limits.tokens_per_minute:
            standing = self.accounts.standing(hold)
            buckets = self._buckets(standing, now)
            buckets["tokens"].level += hold.num_tokens - num_used_tokens
            self._remember(hold, standing, buckets, now)
        self.accounts.release(hold)

    def _count(self, client: _Client, sign: int, hold: Reservation) -> None:
        self.num_answers += sign * hold.num_answers
        self.num_tokens += sign * hold.num_tokens
        client.num_requests += sign

    def _buckets(self, standing: ClientUsage, now: float) -> dict[str, Bucket]:
        """What is left of the minute."""
        pairs = (
            ("requests", self.limits.requests_per_minute, standing.requests_left),
            ("tokens", self.limits.tokens_per_minute, standing.tokens_left),
        )
        if standing.at is None:
            return {kind: Bucket(limit, limit) for kind, limit, _ in pairs}
        passed = max(0.0, now - standing.at)
        # rounded, so that a minute divided into parts is a whole minute again
        return {kind: Bucket(limit, min(limit, round(left + passed * limit / 60, 6))) for kind, limit, left in pairs}

    def _remember(self, hold: Reservation, standing: ClientUsage, buckets: dict[str, Bucket], now: float) -> None:
        # later than what it goes by, even where the clock has not moved
        at = now if standing.at is None else max(now, math.nextafter(standing.at, math.inf))
        self.accounts.remember(hold, buckets["requests"].level, buckets["tokens"].level, at)

    def _check_client(self, standing: ClientUsage, buckets: dict[str, Bucket], num_tokens: int, now: float) -> None:
        limits = self.limits
        if limits.max_concurrent and standing.num_requests > limits.max_concurrent:
            message = f"Rate limit reached for concurrent requests: Limit {limits.max_concurrent}."
            raise _too_many(message, "requests", self._seconds(1, 0, now), {})
        for kind, amount in (("requests", 1), ("tokens", num_tokens)):
            bucket = buckets[kind]
            if not bucket.per_minute or amount <= bucket.level:
                continue
            wait = bucket.seconds_until(amount)
            message = (
                f"Rate limit reached for {kind} per min: Limit {bucket.per_minute}, "
                f"Used {max(0, math.ceil(bucket.per_minute - bucket.level))}, Requested {amount}."
            )
            headers = _rate_headers(kind, bucket.per_minute, bucket.level, wait)
            if amount > bucket.per_minute:
                raise _too_many(message + " The request is too large.", kind, wait, headers, can_retry=False)
            raise _too_many(message, kind, wait, headers)

    def _check_queue(self, standing: ClientUsage, hold: Reservation, capacity: Capacity, now: float) -> None:
        max_answers, max_tokens = self._bounds(capacity)
        all_answers, all_tokens = self.accounts.in_flight()
        # whoever has nothing else in flight must not be refused for the size of one request
        own = OWN_SHARE if standing.num_requests > 1 else 1.0
        excess_answers = max(all_answers - max_answers, standing.num_answers - int(max_answers * own))
        excess_tokens = max(all_tokens - max_tokens, standing.num_tokens - int(max_tokens * own))
        if all_answers == hold.num_answers or (excess_answers <= 0 and excess_tokens <= 0):
            return  # an idle server takes whatever the engine can take
        raise _too_many(
            "The server is at its capacity and its queue is full.",
            "requests" if excess_answers > 0 else "tokens",
            self._seconds(excess_answers, excess_tokens, now),
            self._queue_headers(standing, capacity, now),
        )

    def _bounds(self, capacity: Capacity) -> tuple[int, int]:
        """The most answers and tokens in flight, in all workers."""
        limits, num_workers = self.limits, self.accounts.num_workers
        return (
            num_workers * capacity.max_sequences + limits.max_queued_requests,
            num_workers * capacity.kv_tokens + limits.max_queued_tokens,
        )

    def _seconds(self, num_answers: int, num_tokens: int, now: float) -> float:
        """Until this much has left, at the rate at which requests leave now, if the other workers are as fast."""
        rates = (self._answer_rate.per_second(now), self._token_rate.per_second(now))
        pairs = zip((num_answers, num_tokens), rates, strict=True)
        alone = max((amount / rate for amount, rate in pairs if amount > 0 and rate > 0), default=0.0)
        return alone / self.accounts.num_workers

    def _headers(
        self, standing: ClientUsage, buckets: dict[str, Bucket], capacity: Capacity, now: float
    ) -> dict[str, str]:
        headers = self._queue_headers(standing, capacity, now)
        for kind, bucket in buckets.items():
            if bucket.per_minute:
                full = bucket.seconds_until(bucket.per_minute)
                headers |= _rate_headers(kind, bucket.per_minute, bucket.level, full)
        return headers

    def _queue_headers(self, standing: ClientUsage, capacity: Capacity, now: float) -> dict[str, str]:
        all_answers, all_tokens = self.accounts.in_flight()
        answers, tokens = (int(bound * OWN_SHARE) for bound in self._bounds(capacity))
        return _rate_headers(
            "requests", answers, answers - max(standing.num_answers, all_answers - answers // 3),
            self._seconds(all_answers, 0, now),
        ) | _rate_headers(
            "tokens", tokens, tokens - max(standing.num_tokens, all_tokens - tokens // 3),
            self._seconds(0, all_tokens, now),
        )  # fmt: skip

    def _new_client(self, name: str) -> _Client:
        if len(self._clients) >= self._forget_at:
            for idle in [name for name, client in self._clients.items() if not client.num_requests]:
                del self._clients[idle]
            self._forget_at = max(MAX_IDLE_CLIENTS, 2 * len(self._clients))
        client = self._clients[name] = _Client()
        return client


def _rate_headers(kind: str, limit: int, remaining: float, reset_seconds: float) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{kind}": str(limit),
        f"x-ratelimit-remaining-{kind}": str(max(0, math.floor(remaining))),
        f"x-ratelimit-reset-{kind}": duration(reset_seconds),
    }


def duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 6s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"


def _too_many(message: str, kind: str, seconds: float, headers: dict[str, str], can_retry: bool = True) -> APIError:
    retry = min(max(MIN_RETRY_SECONDS, math.ceil(seconds)), MAX_RETRY_SECONDS)
    return APIError(
        429,
        f"{message} Please try again in {retry}s." if can_retry else message,
        kind,
        None,
        "rate_limit_exceeded",
        headers | ({"retry-after": str(retry)} if can_retry else {"x-should-retry": "false"}),
    )
