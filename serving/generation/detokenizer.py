"""Token ids to text, as they come. Never half a character, and in the end exactly the text of the whole run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_INCOMPLETE_BYTES = 3  # a character of UTF-8 has at most four
WINDOW = 8  # tokens decoded again with each new one


class Detokenizer:
    """Decodes a sliding window, because the text of a run of ids is not the sum of its tokens' texts: the first
    piece loses its leading space, and several byte tokens make one character."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """before: the ids that the text goes on from, the last few at least. Their text is not returned."""
        self._decode = decode
        self._ids: list[int] = []  # the window
        self._num_sent = 0  # characters of the window's text that were returned
        for token_id in before[-WINDOW:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; often ''."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        num_held = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_INCOMPLETE_BYTES)
        certain = len(text) - num_held
        fresh = text[self._num_sent : certain]
        self._num_sent = max(self._num_sent, certain)
        if not num_held and len(self._ids) > WINDOW:
            tail = self._ids[-1:]
            tail_text = self._decode(tail)
            if tail_text and REPLACEMENT not in tail_text:
                self._ids, self._num_sent = tail, len(tail_text)
        return fresh

    def flush(self) -> str:
        """What is left at the end: the replacement characters of an incomplete character."""
        rest = self._decode(self._ids)[self._num_sent :]
        self._num_sent += len(rest)
        return rest
