"""A sequence's tokens -> draft tokens for speculative decoding: what followed the last n-gram where it occurred before.

Quotes, summaries and code repeat the prompt. Draft tokens are rows of the step that computes one token anyway, and only
those that greedy decoding would have chosen are accepted: the answer never changes.
Source: prompt lookup decoding (Saxena, 2023).
"""

from __future__ import annotations

NGRAM = 3  # tokens that must have occurred before
MAX_DRAFT = 4  # tokens; the weights are read once for all of them
MAX_DECODING = 4  # with more sequences decoding, every further row costs time
MIN_ACCEPTED = 0.5  # tokens of a draft on average; below, no drafts are proposed for a while
PAUSE = 48  # tokens until a draft is proposed again
MEMORY = 0.7  # of the running average


class PromptLookup:
    """The n-grams of one sequence and how many draft tokens are accepted on average."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> the index behind its last occurrence
        self._num_indexed = 0
        self._mean_accepted = float(MAX_DRAFT)
        self._resume_at = 0  # the length from which on drafts are proposed

    def propose(self, token_ids: list[int], max_draft: int) -> tuple[int, ...]:
        """What may follow `token_ids`, at most `max_draft` tokens; () if the last n-gram is new."""
        for end in range(max(NGRAM, self._num_indexed), len(token_ids)):
            self._ends[tuple(token_ids[end - NGRAM : end])] = end  # without the last n-gram, which is looked up
        self._num_indexed = max(self._num_indexed, len(token_ids))
        if len(token_ids) < self._resume_at:
            return ()
        start = self._ends.get(tuple(token_ids[-NGRAM:]))
        return () if start is None else tuple(token_ids[start : start + min(MAX_DRAFT, max_draft)])

    def observe(self, num_tokens: int, num_accepted: int) -> None:
        """So many tokens of a draft were accepted, after which the sequence has `num_tokens`."""
        self._mean_accepted = MEMORY * self._mean_accepted + (1 - MEMORY) * num_accepted
        if self._mean_accepted < MIN_ACCEPTED:
            self._mean_accepted, self._resume_at = 2 * MIN_ACCEPTED, num_tokens + PAUSE
