"""What every endpoint shares: limits of requests and streams."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ApiLimits:
    """What the edge accepts from one client."""

    max_body_bytes: int = 4 * 2**20
    max_json_depth: int = 64
    max_n: int = 128  # answers of one request, over all its prompts
    ping_seconds: float = 15.0  # silence after which a stream sends a comment
    max_ready_events: int = 256  # events of one stream held for a slow reader
    stall_seconds: float = 60.0  # a reader that takes nothing for this long has left
    timeout_seconds: float = math.inf  # from a request's arrival to the end of its answer
