"""Token ids one by one -> text in whole characters, in total the text of the whole run of ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_INCOMPLETE_BYTES = 3  # a character of UTF-8 has at most four
WINDOW = 8  # tokens decoded again with each new one
MAX_WINDOW = 32  # of text that has no beginning to cut at


class Detokenizer:
    """Decodes a sliding window, because the text of a run of ids is not the sum of its tokens' texts: the first
    piece loses its leading space, and several byte tokens make one character."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        token_bytes: Callable[[int], bytes],
        before: Sequence[int] = (),
    ) -> None:
        """before: the ids whose text is continued, at least the last few. Their text is not returned."""
        self._decode = decode
        self._token_bytes = token_bytes
        self._ids: list[int] = []  # the window
        self._num_sent = 0  # characters of the window's text that were returned
        for token_id in before[-WINDOW:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that this token completes; often ''."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        num_incomplete = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_INCOMPLETE_BYTES)
        num_complete = len(text) - num_incomplete
        fresh = text[self._num_sent : num_complete]
        self._num_sent = max(self._num_sent, num_complete)
        if not num_incomplete and len(self._ids) > WINDOW:
            tail = self._ids[-1:]
            tail_text = self._decode(tail)
            if tail_text and REPLACEMENT not in tail_text:
                self._ids, self._num_sent = tail, len(tail_text)
        if len(self._ids) > MAX_WINDOW:
            self._shorten(text)
        return fresh

    def _shorten(self, text: str) -> None:
        """Bound the window where no single token has a text: a run of broken bytes, of spaces or of special tokens.

        One special token breaks a character as many do. Bytes to come can change the last characters only, so that the
        tokens in front of these are kept if the text ends in the same way; the first token keeps the space after it.
        """
        num_unsent = len(text) - self._num_sent
        size = self._token_bytes
        ids = [token for i, token in enumerate(self._ids) if i == 0 or size(token) or size(self._ids[i - 1])]
        shorter = [ids[0], *ids[-WINDOW:]]
        if len(ids) > MAX_WINDOW and text and self._decode(shorter).endswith(text[-MAX_INCOMPLETE_BYTES - 1 :]):
            ids = shorter
        self._ids, self._num_sent = ids, len(self._decode(ids)) - num_unsent

    def flush(self) -> str:
        """The rest at the end. A character that is cut off there is one replacement character, though SentencePiece
        decodes it to one for each byte."""
        rest = self._decode(self._ids)[self._num_sent :]
        self._num_sent += len(rest)
        for length in range(MAX_INCOMPLETE_BYTES, 1, -1):
            last = self._ids[-length:]
            is_cut = b"".join(map(self._token_bytes, last)).decode(errors="replace") == REPLACEMENT
            if is_cut and rest.endswith(REPLACEMENT * length) and self._decode(last) == REPLACEMENT * length:
                return rest[: 1 - length]
        return rest
