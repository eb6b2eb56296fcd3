"""Prompts are cut into chunks beside running answers, and not cut when nothing is decoding."""

from __future__ import annotations

from serving.engine.native.scheduler import MIN_PROMPT_ROWS, STRETCH, PrefillPacer

STEP, ROW = 0.100, 0.002  # seconds for a step's weights and for each row, on the machine of these tests


def step_seconds(num_decoding: int, num_rows: int) -> float:
    return STEP + ROW * (num_decoding + num_rows)


def learned() -> PrefillPacer:
    pacer = PrefillPacer(max_rows=512)
    for num_decoding, num_rows in ((0, 512), (0, 300), (4, 0), (4, 0)):
        pacer.observe(num_decoding, num_rows, step_seconds(num_decoding, num_rows))
    return pacer


def test_alone_a_prompt_takes_the_whole_step() -> None:
    assert PrefillPacer(512).num_prompt_rows(0) == 512
    assert learned().num_prompt_rows(0) == 512


def test_a_step_is_stretched_no_further_than_allowed() -> None:
    for num_decoding in (4, 16, 64):
        rows = learned().num_prompt_rows(num_decoding)
        assert rows > MIN_PROMPT_ROWS
        assert step_seconds(num_decoding, rows) <= 1.1 * (1 + STRETCH) * step_seconds(num_decoding, 0)


def test_the_more_answers_are_running_the_more_of_a_prompt_goes_beside_them() -> None:
    """Their step takes longer by itself; with a burst of prompts there is hardly ever one without any."""
    pacer = learned()
    few, many = pacer.num_prompt_rows(4), pacer.num_prompt_rows(60)
    assert many - few >= STRETCH * 50


def test_mixed_steps_alone_do_not_lead_astray() -> None:
    pacer = learned()
    for _ in range(200):
        rows = pacer.num_prompt_rows(16)
        pacer.observe(16, rows, step_seconds(16, rows))
    assert step_seconds(16, pacer.num_prompt_rows(16)) <= 1.1 * (1 + STRETCH) * step_seconds(16, 0)


def test_a_backlog_of_prompts_is_read_in_larger_pieces_and_one_prompt_is_not() -> None:
    pacer = learned()
    assert pacer.num_prompt_rows(4, backlog=1000) == pacer.num_prompt_rows(4)
    assert pacer.num_prompt_rows(4, backlog=16_000) >= 4 * pacer.num_prompt_rows(4)


def test_prompts_always_move() -> None:
    pacer = learned()
    for _ in range(50):
        pacer.observe(0, 10, 60.0)  # a machine that was put to sleep in the middle
    assert pacer.num_prompt_rows(4) == MIN_PROMPT_ROWS
