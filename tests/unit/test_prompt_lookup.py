"""Drafts come from the sequence's own text, and stop where they are not accepted."""

from __future__ import annotations

from serving.engine.interface import SamplingParams
from serving.engine.native.prompt_lookup import MAX_DRAFT, PAUSE, PromptLookup
from serving.engine.native.scheduler import can_speculate
from serving.engine.native.sequence import SequenceState


def test_after_the_same_tokens_the_same_tokens_are_proposed() -> None:
    assert PromptLookup().propose([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3], 10) == (4, 5, 6, 7)[:MAX_DRAFT]
    assert PromptLookup().propose([1, 2, 3, 4, 5, 6, 1, 2, 3], 2) == (4, 5)


def test_the_latest_occurrence_counts_and_growth_is_followed() -> None:
    lookup = PromptLookup()
    ids = [1, 2, 3, 4, 8, 1, 2, 3, 5, 9, 1, 2]
    assert lookup.propose(ids, 4) == ()
    assert lookup.propose([*ids, 3], 4) == (5, 9, 1, 2)


def test_without_repetition_nothing_is_proposed() -> None:
    assert PromptLookup().propose(list(range(50)), 4) == ()
    assert PromptLookup().propose([1, 1], 4) == ()


def test_drafts_pause_where_they_are_not_accepted_and_come_back() -> None:
    lookup, ids = PromptLookup(), [1, 2, 3, 4, 1, 2, 3]
    for _ in range(20):
        lookup.observe(len(ids), 0)
    assert lookup.propose(ids, 4) == ()
    later = [*range(100, 100 + PAUSE), *ids]
    assert lookup.propose(later, 4) != ()


def test_only_plain_greedy_requests_are_speculated() -> None:
    assert can_speculate(SequenceState([1], SamplingParams(8, temperature=0.0)))
    for sampling in (
        SamplingParams(8, temperature=0.7),
        SamplingParams(8, temperature=0.0, presence_penalty=0.1),
        SamplingParams(8, temperature=0.0, repetition_penalty=1.1),
        SamplingParams(8, temperature=0.0, logit_bias=((5, 1.0),)),
        SamplingParams(8, temperature=0.0, min_tokens=3),
    ):
        assert not can_speculate(SequenceState([1], sampling))
