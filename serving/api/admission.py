"""Who may come in, in which order, and when to come again. Counts answers and tokens; knows no text and no engine.

In flight is whatever was let in and is not finished. Its bound is what the engine can hold plus a queue. Within the
queue, clients take turns by tokens (start-time fair queueing): a client's next request starts where its last one ends
in virtual time, so 200 requests of one client stand behind each other and not in front of everybody else's; and no
client may fill the queue so far that nobody else gets in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.api.errors import APIError

RATE_SECONDS = 30.0  # memory of the drain rate
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1, 300
OWN_SHARE = 0.75  # of everything in flight that one client may have
MAX_IDLE_CLIENTS = 4096  # remembered; past it those with nothing in flight are forgotten


@dataclass(frozen=True)
class AdmissionLimits:
    """0 means no limit, for the limits of one client."""

    max_queued_requests: int = 256  # answers beyond those that the engine generates at once
    max_queued_tokens: int = 1_000_000  # prompt and answer tokens beyond those that the cache holds
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_concurrent: int = 0  # requests of one client in flight


@dataclass(frozen=True)
class Capacity:
    """What the engine works on at once."""

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
    """A token bucket that holds one minute's allowance."""

    per_minute: int
    level: float
    updated: float

    def refill(self, now: float) -> None:
        self.level = min(float(self.per_minute), self.level + (now - self.updated) * self.per_minute / 60)
        self.updated = now

    def seconds_until(self, amount: float) -> float:
        """How long to wait for this much; call `refill` before."""
        return max(0.0, (min(amount, self.per_minute) - self.level) * 60 / self.per_minute)


@dataclass
class _Client:
    """What is remembered of one client."""

    requests: Bucket | None
    tokens: Bucket | None
    num_requests: int = 0  # in flight
    num_answers: int = 0
    num_tokens: int = 0
    ends: int = 0  # virtual time at which its last request ends


@dataclass(eq=False)
class Ticket:
    """One request's permission. Must be closed exactly once when the request is over; a second time does nothing."""

    priority: int  # for the engine: smaller goes first
    headers: dict[str, str]
    _admission: Admission
    _client: str
    _num_answers: int
    _num_tokens: int
    _is_open: bool = True

    def started(self) -> None:
        """The first token came: virtual time has reached this request."""
        self._admission.reach(self.priority)

    def close(self, num_used_tokens: int | None) -> None:
        """num_used_tokens: prompt and answer together; None if it is not known, because the client left."""
        if self._is_open:
            self._is_open = False
            used = self._num_tokens if num_used_tokens is None else num_used_tokens
            self._admission.leave(self._client, self._num_answers, self._num_tokens, used)


@dataclass(eq=False)
class Admission:
    """The door. For one event loop."""

    limits: AdmissionLimits = field(default_factory=AdmissionLimits)
    clock: Callable[[], float] = time.monotonic
    num_answers: int = 0  # in flight
    num_tokens: int = 0
    _virtual_time: int = 0
    _forget_at: int = MAX_IDLE_CLIENTS
    _clients: dict[str, _Client] = field(default_factory=dict[str, _Client])
    _answer_rate: Rate = field(default_factory=Rate)
    _token_rate: Rate = field(default_factory=Rate)

    def admit(self, name: str, num_answers: int, num_tokens: int, capacity: Capacity) -> Ticket:
        """Let a request in. Raises APIError 429 with the seconds to wait.

        name: the client's; num_tokens: the prompt and the longest answers that it may get.
        """
        now = self.clock()
        client = self._clients.get(name) or self._new_client(name, now)
        self._check_client(client, num_tokens, now)
        self._check_queue(client, num_answers, num_tokens, capacity, now)
        self._count(client, 1, num_answers, num_tokens)
        if client.requests:
            client.requests.level -= 1
        if client.tokens:
            client.tokens.level -= num_tokens
        starts = max(self._virtual_time, client.ends)
        client.ends = starts + num_tokens
        return Ticket(starts, self._headers(client, capacity, now), self, name, num_answers, num_tokens)

    def reach(self, virtual_time: int) -> None:
        """A request that starts at this virtual time has begun to be answered."""
        self._virtual_time = max(self._virtual_time, virtual_time)

    def leave(self, name: str, num_answers: int, num_tokens: int, num_used_tokens: int) -> None:
        """A request is over."""
        now = self.clock()
        self._answer_rate.add(num_answers, now)
        self._token_rate.add(num_tokens, now)
        client = self._clients[name]
        self._count(client, -1, -num_answers, -num_tokens)
        if client.tokens:
            client.tokens.level += num_tokens - num_used_tokens

    def _count(self, client: _Client, num_requests: int, num_answers: int, num_tokens: int) -> None:
        self.num_answers += num_answers
        self.num_tokens += num_tokens
        client.num_requests += num_requests
        client.num_answers += num_answers
        client.num_tokens += num_tokens

    def _check_client(self, client: _Client, num_tokens: int, now: float) -> None:
        limits = self.limits
        if limits.max_concurrent and client.num_requests >= limits.max_concurrent:
            message = f"Rate limit reached for concurrent requests: Limit {limits.max_concurrent}."
            raise _too_many(message, "requests", self._seconds(1, 0, now), {})
        for bucket, amount, kind in ((client.requests, 1, "requests"), (client.tokens, num_tokens, "tokens")):
            if bucket is None:
                continue
            bucket.refill(now)
            wait = bucket.seconds_until(amount)
            if amount <= bucket.level:
                continue
            message = (
                f"Rate limit reached for {kind} per min: Limit {bucket.per_minute}, "
                f"Used {max(0, math.ceil(bucket.per_minute - bucket.level))}, Requested {amount}."
            )
            headers = _rate_headers(kind, bucket.per_minute, bucket.level, wait)
            if amount > bucket.per_minute:
                raise _too_many(message + " The request is too large.", kind, wait, headers, can_retry=False)
            raise _too_many(message, kind, wait, headers)

    def _check_queue(self, client: _Client, num_answers: int, num_tokens: int, capacity: Capacity, now: float) -> None:
        max_answers, max_tokens = self._bounds(capacity)
        # whoever has nothing in flight must not be refused for the size of one request
        own = OWN_SHARE if client.num_requests else 1.0
        excess_answers = max(
            self.num_answers + num_answers - max_answers, client.num_answers + num_answers - int(max_answers * own)
        )
        excess_tokens = max(
            self.num_tokens + num_tokens - max_tokens, client.num_tokens + num_tokens - int(max_tokens * own)
        )
        if not self.num_answers or (excess_answers <= 0 and excess_tokens <= 0):
            return  # an idle server takes whatever the engine can take
        raise _too_many(
            "The server is at its capacity and its queue is full.",
            "requests" if excess_answers > 0 else "tokens",
            self._seconds(excess_answers, excess_tokens, now),
            self._queue_headers(client, capacity, now),
        )

    def _bounds(self, capacity: Capacity) -> tuple[int, int]:
        """The most answers and tokens in flight."""
        limits = self.limits
        return capacity.max_sequences + limits.max_queued_requests, capacity.kv_tokens + limits.max_queued_tokens

    def _seconds(self, num_answers: int, num_tokens: int, now: float) -> float:
        """Until this much has left, at the rate at which requests leave now."""
        pairs = ((num_answers, self._answer_rate.per_second(now)), (num_tokens, self._token_rate.per_second(now)))
        return max((amount / rate for amount, rate in pairs if amount > 0 and rate > 0), default=0.0)

    def _headers(self, client: _Client, capacity: Capacity, now: float) -> dict[str, str]:
        headers = self._queue_headers(client, capacity, now)
        for kind, bucket in (("requests", client.requests), ("tokens", client.tokens)):
            if bucket:
                full = bucket.seconds_until(bucket.per_minute)
                headers |= _rate_headers(kind, bucket.per_minute, bucket.level, full)
        return headers

    def _queue_headers(self, client: _Client, capacity: Capacity, now: float) -> dict[str, str]:
        answers, tokens = (int(bound * OWN_SHARE) for bound in self._bounds(capacity))
        return _rate_headers(
            "requests", answers, answers - max(client.num_answers, self.num_answers - answers // 3),
            self._seconds(self.num_answers, 0, now),
        ) | _rate_headers(
            "tokens", tokens, tokens - max(client.num_tokens, self.num_tokens - tokens // 3),
            self._seconds(0, self.num_tokens, now),
        )  # fmt: skip

    def _new_client(self, name: str, now: float) -> _Client:
        if len(self._clients) >= self._forget_at:
            self._forget(now)
            self._forget_at = max(MAX_IDLE_CLIENTS, 2 * len(self._clients))
        per_minute = (self.limits.requests_per_minute, self.limits.tokens_per_minute)
        requests, tokens = (Bucket(limit, limit, now) if limit else None for limit in per_minute)
        client = self._clients[name] = _Client(requests, tokens)
        return client

    def _forget(self, now: float) -> None:
        """Drop the clients about whom nothing is left to know but their place in virtual time."""
        for name, client in list(self._clients.items()):
            buckets = [bucket for bucket in (client.requests, client.tokens) if bucket]
            for bucket in buckets:
                bucket.refill(now)
            is_full = all(bucket.level >= bucket.per_minute for bucket in buckets)
            if not client.num_requests and is_full:
                del self._clients[name]


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
