"""Limits of requests, streams and clients that every endpoint keeps; `service.py` fills them from the settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from serving.http.json_body import BodyLimits


@dataclass(frozen=True)
class ApiLimits:
    """What the API accepts from one client."""

    body: BodyLimits = field(default_factory=BodyLimits)
    ignores_unknown: bool = False  # fields that no type has are named in a header instead of refused
    max_n: int = 128  # answers of one request, over all its prompts
    ping_seconds: float = 15.0  # silence after which a stream sends a comment
    progress_seconds: float = 2.0  # the same before the first token; the comment says how far the prompt is
    stall_seconds: float = 60.0  # a client that reads nothing for this long counts as disconnected
    load_seconds: float = 300.0  # that a request waits for its model to be loaded
    timeout_seconds: float = math.inf  # from a request's arrival to the end of its answer
