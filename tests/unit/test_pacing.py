"""Prompts are cut so that running answers keep their rhythm, and not cut when nobody is waiting for a token."""

from __future__ import annotations

from serving.engine.pacing import MIN_ROWS, STRETCH, Pacer

DECODE, ROW = 0.100, 0.002  # seconds of the machine that these tests imagine


def step_seconds(num_decoding: int, num_rows: int) -> float:
    return (DECODE if num_decoding else 0.0) + ROW * num_rows


def learned() -> Pacer:
    pacer = Pacer(max_rows=512)
    for num_decoding, num_rows in ((0, 512), (0, 300), (4, 0), (4, 0)):
        pacer.observe(num_decoding, num_rows, step_seconds(num_decoding, num_rows))
    return pacer


def test_alone_a_prompt_takes_the_whole_step() -> None:
    assert Pacer(512).num_prompt_rows(0) == 512
    assert learned().num_prompt_rows(0) == 512


def test_a_step_is_stretched_no_further_than_allowed() -> None:
    rows = learned().num_prompt_rows(4)
    assert MIN_ROWS <= rows <= STRETCH * DECODE / ROW
    assert step_seconds(4, rows) <= (1 + STRETCH) * DECODE + 1e-9


def test_mixed_steps_alone_do_not_lead_astray() -> None:
    pacer = learned()
    for _ in range(200):
        rows = pacer.num_prompt_rows(16)
        pacer.observe(16, rows, step_seconds(16, rows))
    assert step_seconds(16, pacer.num_prompt_rows(16)) <= (1.1 + STRETCH) * DECODE


def test_prompts_always_move() -> None:
    pacer = learned()
    for _ in range(50):
        pacer.observe(0, 10, 60.0)  # a machine that was put to sleep in the middle
    assert pacer.num_prompt_rows(4) == MIN_ROWS
