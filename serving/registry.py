"""What the HTTP edge serves at the moment, and how much it accepts. Knows no HTTP."""

from __future__ import annotations

from dataclasses import dataclass

from serving.generation.pipeline import RunningModel


@dataclass
class ModelRegistry:
    """The one model of this process under all its names. `service.py` fills in `model` or `error` when loading ends.

    Written by one thread, once; read by the event loop.
    """

    name: str
    aliases: tuple[str, ...] = ()
    accept_any: bool = False  # answer to every model name
    created: int = 0  # Unix seconds
    fingerprint: str = "fp_chatglm"
    model: RunningModel | None = None  # None while it is loading
    error: str | None = None  # loading failed; one line for the log, never sent to a client

    def answers_to(self, name: str) -> bool:
        """Whether a request for this model name is for the model served here."""
        return self.accept_any or name == self.name or name in self.aliases

    @property
    def names(self) -> tuple[str, ...]:
        """Every name listed by `/models`, the true one first, none twice."""
        return tuple(dict.fromkeys((self.name, *self.aliases)))
