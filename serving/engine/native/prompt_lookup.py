"""Guesses the next tokens of an answer from its own text: after the same words, the same words. Pure; no model.

Quotes, summaries and code repeat what the prompt says. Guessed tokens go through the network in the step that would
compute one token anyway, and only those that greedy decoding would have chosen are kept: the answer never changes.
Source of the idea: prompt lookup decoding (Saxena, 2023).
"""

from __future__ import annotations

from serving.engine.interface import SamplingParams

NGRAM = 3  # tokens that must have occurred before
MAX_DRAFT = 4  # guessed at once; the weights are read once for all of them
MAX_DECODING = 4  # with more answers under way, every row costs
MIN_GAIN = 0.5  # tokens a guess must bring on average; below, guessing pauses
PAUSE = 48  # tokens until it is tried again
MEMORY = 0.7


class PromptLookup:
    """The n-grams of one sequence, and whether guessing pays for it."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}  # n-gram -> the index behind its last occurrence
        self._num_indexed = 0
        self._gain = float(MAX_DRAFT)  # hopeful at first
        self._resume_at = 0

    def propose(self, token_ids: list[int], max_draft: int) -> tuple[int, ...]:
        """What may come after `token_ids`, at most `max_draft` tokens; () if nothing suggests itself."""
        for end in range(max(NGRAM, self._num_indexed), len(token_ids)):
            self._places[tuple(token_ids[end - NGRAM : end])] = end  # the last n-gram of all is the one looked for
        self._num_indexed = max(self._num_indexed, len(token_ids))
        if len(token_ids) < self._resume_at:
            return ()
        place = self._places.get(tuple(token_ids[-NGRAM:]))
        return () if place is None else tuple(token_ids[place : place + min(MAX_DRAFT, max_draft)])

    def learn(self, num_tokens: int, num_accepted: int) -> None:
        """A guess at length `num_tokens` brought so many tokens."""
        self._gain = MEMORY * self._gain + (1 - MEMORY) * num_accepted
        if self._gain < MIN_GAIN:
            self._gain, self._resume_at = 2 * MIN_GAIN, num_tokens + PAUSE


def can_guess(sampling: SamplingParams) -> bool:
    """Whether the next token is the most likely one and nothing else: no dice, and no memory of what came before."""
    has_memory = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
    return sampling.temperature == 0 and not (has_memory or sampling.logit_bias or sampling.min_tokens)
