"""What the HTTP edge serves at the moment, and how much it accepts. Knows no HTTP."""

from __future__ import annotations

import math
from dataclasses import dataclass

from serving.chat.pipeline import ServedModel


@dataclass
class Served:
    """The one model of this process under all its names. `service.py` fills in `model` or `error` when loading ends.

    Written by one thread, once; read by the event loop.
    """

    name: str
    aliases: tuple[str, ...] = ()
    accept_any: bool = False  # answer to every model name
    created: int = 0  # Unix seconds
    fingerprint: str = "fp_chatglm"
    model: ServedModel | None = None  # None while it is loading
    error: str | None = None  # loading failed; one line for the log, never sent to a client

    def answers_to(self, name: str) -> bool:
        """Whether a request for this model name is for the model served here."""
        return self.accept_any or name == self.name or name in self.aliases

    @property
    def names(self) -> tuple[str, ...]:
        """Every name listed by `/models`, the true one first, none twice."""
        return tuple(dict.fromkeys((self.name, *self.aliases)))


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
