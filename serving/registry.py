"""Model names -> the running model that answers to them."""

from __future__ import annotations

from dataclasses import dataclass

from serving.generation.pipeline import RunningModel


@dataclass
class ModelRegistry:
    """The one model of this process under all its names. `service.py` sets `model` or `error` when loading ends.

    Written by one thread, once; read by the event loop.
    """

    name: str
    aliases: tuple[str, ...] = ()
    accept_any: bool = False  # answer to every model name
    created: int = 0  # Unix seconds
    fingerprint: str = "fp_chatglm"
    model: RunningModel | None = None  # None while it is loading
    error: str | None = None  # why loading failed, for the log; never sent to a client

    def serves(self, name: str) -> bool:
        """Whether a request for this model name is for the model of this process."""
        return self.accept_any or name in self.names

    @property
    def names(self) -> tuple[str, ...]:
        """Every name listed by `/models`, the true one first, none twice."""
        return tuple(dict.fromkeys((self.name, *self.aliases)))
