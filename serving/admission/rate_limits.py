"""What one client has left of its minute -> a refusal with Retry-After, and the x-ratelimit-* headers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from serving.admission.client_usage import ClientUsage
from serving.http.errors import APIError

MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1, 300


@dataclass
class TokenBucket:
    """One minute's allowance of requests or tokens. per_minute 0: no limit."""

    kind: str
    per_minute: int
    level: float

    def seconds_until(self, amount: float) -> float:
        """How long to wait for this much."""
        return max(0.0, (min(amount, self.per_minute) - self.level) * 60 / self.per_minute)

    def headers(self) -> dict[str, str]:
        """{} without a limit."""
        if not self.per_minute:
            return {}
        return rate_headers(self.kind, self.per_minute, self.level, self.seconds_until(self.per_minute))

    def check(self, amount: int) -> None:
        """Raises APIError 429 if less than this is left."""
        if not self.per_minute or amount <= self.level:
            return
        wait = self.seconds_until(amount)
        used = max(0, math.ceil(self.per_minute - self.level))
        message = (
            f"Rate limit reached for {self.kind} per min: Limit {self.per_minute}, Used {used}, Requested {amount}."
        )
        headers = rate_headers(self.kind, self.per_minute, self.level, wait)
        if amount > self.per_minute:
            raise too_many(message + " The request is too large.", self.kind, wait, headers, can_retry=False)
        raise too_many(message, self.kind, wait, headers)


def minute_buckets(
    requests_per_minute: int, tokens_per_minute: int, usage: ClientUsage, now: float
) -> tuple[TokenBucket, TokenBucket]:
    """One client's allowances of requests and of tokens, refilled up to now."""
    pairs = (("requests", requests_per_minute, usage.requests_left), ("tokens", tokens_per_minute, usage.tokens_left))
    if usage.at is None:
        requests, tokens = (TokenBucket(kind, limit, limit) for kind, limit, _ in pairs)
    else:
        minutes = max(0.0, now - usage.at) / 60
        # rounded, so that a minute divided into parts is a whole minute again
        requests, tokens = (
            TokenBucket(k, limit, min(limit, round(left + minutes * limit, 6))) for k, limit, left in pairs
        )
    return requests, tokens


def rate_headers(kind: str, limit: int, remaining: float, reset_seconds: float) -> dict[str, str]:
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


def too_many(message: str, kind: str, seconds: float, headers: dict[str, str], can_retry: bool = True) -> APIError:
    """429. seconds: to wait before another try."""
    retry = min(max(MIN_RETRY_SECONDS, math.ceil(seconds)), MAX_RETRY_SECONDS)
    return APIError(
        429,
        f"{message} Please try again in {retry}s." if can_retry else message,
        kind,
        None,
        "rate_limit_exceeded",
        headers | ({"retry-after": str(retry)} if can_retry else {"x-should-retry": "false"}),
    )
