"""How many rows of prompts a step may carry, so that running answers keep their rhythm. Knows durations, no clock."""

from __future__ import annotations

STRETCH = 1.5  # a step with prompt rows may take this much longer than one without
MIN_ROWS = 32  # fewer would read all weights for next to nothing
MEMORY = 0.8  # of the running averages


class Pacer:
    """Learns what a decode step and what a prompt row cost, and cuts prompts so that p99 of the time per token stays
    below three times its median while long prompts arrive."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._decode_seconds: float | None = None
        self._row_seconds: float | None = None

    def num_prompt_rows(self, num_decoding: int) -> int:
        """How many prompt rows the next step may carry beside `num_decoding` running answers."""
        free = self._max_rows - num_decoding
        if not num_decoding or self._decode_seconds is None or not self._row_seconds:
            return free
        return min(free, max(MIN_ROWS, int(STRETCH * self._decode_seconds / self._row_seconds)))

    def observe(self, num_decoding: int, num_prompt_rows: int, seconds: float) -> None:
        """What the last step carried and how long it took."""
        if num_decoding and not num_prompt_rows:
            self._decode_seconds = _average(self._decode_seconds, seconds)
        elif num_prompt_rows:
            shared = self._decode_seconds or 0.0 if num_decoding else 0.0
            self._row_seconds = _average(self._row_seconds, max(seconds - shared, 0.2 * seconds) / num_prompt_rows)


def _average(known: float | None, new: float) -> float:
    return new if known is None else MEMORY * known + (1 - MEMORY) * new
