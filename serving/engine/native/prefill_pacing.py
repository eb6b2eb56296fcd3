"""How many rows of prompts a step may carry, so that running answers keep their rhythm. Knows durations, no clock."""

from __future__ import annotations

STRETCH = 1.5  # a step with prompt rows may take this much longer than one without
MIN_ROWS = 32  # fewer would read all weights for next to nothing
BACKLOG = 1500  # rows of waiting prompts from which on steps are stretched further, in proportion
MAX_GROWTH = 6.0  # times as far at most
MEMORY = 0.8  # of the running averages
LEAST_SHARE = 0.2  # of a step's time, for its rows and for the step itself: measurements are noisy


class PrefillPacer:
    """Learns what a step costs whatever it carries, and what each row adds; cuts prompts so that p99 of the time per
    token stays below three times its median while long prompts arrive."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._step_seconds: float | None = None  # of a step without rows: the weights are read once
        self._row_seconds: float | None = None

    def num_prompt_rows(self, num_decoding: int, backlog: int = 0) -> int:
        """How many prompt rows the next step may carry beside `num_decoding` running answers.

        backlog: rows of prompts that are not computed yet. Where many wait, every step has some of them anyway: all get
        slower alike, and the rhythm that is left to keep is a slower one.
        """
        free = self._max_rows - num_decoding
        if not num_decoding or self._step_seconds is None or not self._row_seconds:
            return free
        decode_seconds = self._step_seconds + num_decoding * self._row_seconds
        stretch = STRETCH * min(max(1.0, backlog / BACKLOG), MAX_GROWTH)
        return min(free, max(MIN_ROWS, int(stretch * decode_seconds / self._row_seconds)))

    def observe(self, num_decoding: int, num_prompt_rows: int, seconds: float) -> None:
        """What the last step carried and how long it took."""
        rows, least = num_decoding + num_prompt_rows, LEAST_SHARE * seconds
        if num_prompt_rows:
            self._row_seconds = _average(self._row_seconds, max(seconds - (self._step_seconds or 0), least) / rows)
        elif num_decoding:
            known = num_decoding * (self._row_seconds or 0)
            self._step_seconds = _average(self._step_seconds, max(seconds - known, least))


def _average(known: float | None, new: float) -> float:
    return new if known is None else MEMORY * known + (1 - MEMORY) * new
