"""The soak of benchmarks/soak.py, for as long as a test run can spare."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.soak import MAX_SEQUENCES, run, settings, table
from tests.e2e.server import serving

SECONDS = 30.0


def test_twice_the_capacity_loses_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with serving(tmp_path, settings()) as server:
        tally = asyncio.run(run(server, SECONDS, 2 * MAX_SEQUENCES, seed=7, max_growth_mib=128.0, fresh_weight=8))
    assert not tally.wrong, f"{table(tally, SECONDS)}\n{tally.wrong[:10]}"
    kinds = ("streamed", "whole", "left in the stream", "left before the answer", "bad body", "refused (429)")
    for kind in (*kinds, "fresh schema or tool"):
        assert tally.counts[kind] > 0, table(tally, SECONDS)
