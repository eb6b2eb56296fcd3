"""Text in pieces -> the text before the first stop string, which may be split over several pieces."""

from __future__ import annotations


class StopStrings:
    """Returns text up to the stop string that is complete first; holds back what could be the beginning of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.hit: str | None = None  # the stop string that was found

    def push(self, text: str) -> str:
        """The text that may be shown; '' after a hit."""
        if self.hit is not None or not self._stop:
            return text if self.hit is None else ""
        self._held += text
        # the first to be complete, not the first to begin: the same text then, however it is cut
        found = [(start + len(word), start, word) for word in self._stop if (start := self._held.find(word)) >= 0]
        if found:
            _, start, self.hit = min(found)
            shown, self._held = self._held[:start], ""
            return shown
        keep = max(_overlap(self._held, word) for word in self._stop)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown

    def flush(self) -> str:
        """The held text, for an answer that ended without a stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that begins `word`."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)
