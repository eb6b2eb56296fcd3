"""Thousands of requests through the scheduler with a cache that is full all the time."""

from __future__ import annotations

from benchmarks.cache_day import simulate


def test_a_full_cache_loses_no_block_copies_little_and_finds_nearly_what_an_ideal_one_would() -> None:
    found = simulate(num_requests=1500, num_blocks=1024, at_once=48, max_sequences=32, seed=1)
    assert found["requests"] == 1500
    assert found["blocks_in_use_at_the_end"] == 0
    assert found["most_copied_blocks_in_a_step"] <= 32  # one block for each sequence at most
    assert found["copied_blocks_per_step"] < 1
    assert found["hit_rate"] > 0.9 * found["ideal_hit_rate"] > 0.05
