"""Text comes out in whole characters, and in the end it is the text of the whole run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.generation.detokenizer import REPLACEMENT, Detokenizer
from serving.generation.stop_strings import StopStrings


def decode_bytes(token_ids: Sequence[int]) -> str:
    """A byte a token, and the first space of a run is lost, as SentencePiece does."""
    text = bytes(token_ids).decode("utf-8", errors="replace")
    return text.removeprefix(" ")


def token_bytes(token_id: int) -> bytes:
    return bytes([token_id])


def decode_each(token_ids: Sequence[int]) -> str:
    """One U+FFFD for each byte of a broken character, as SentencePiece does."""
    try:
        return bytes(token_ids).decode()
    except UnicodeDecodeError as error:
        before, rest = token_ids[: error.start], token_ids[error.start + 1 :]
        return bytes(before).decode() + REPLACEMENT + decode_each(rest)


def pieces(token_ids: bytes) -> list[str]:
    detokenizer = Detokenizer(decode_bytes, token_bytes)
    return [*(detokenizer.push(token) for token in token_ids), detokenizer.flush()]


@given(st.text())
def test_text_is_complete_and_never_shows_half_a_character(text: str) -> None:
    got = pieces(text.encode())
    assert "".join(got) == text.removeprefix(" ")
    assert all(REPLACEMENT not in piece for piece in got) or REPLACEMENT in text


@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_give_what_the_whole_run_gives(data: bytes) -> None:
    assert "".join(pieces(data)) == decode_bytes(data)


@given(st.binary(max_size=20), st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), st.data())
def test_a_character_that_is_cut_off_at_the_end_is_one_mark(before: bytes, last: str, data: st.DataObject) -> None:
    before += b"."
    cut = last.encode()[: data.draw(st.integers(1, len(last.encode()) - 1))]
    detokenizer = Detokenizer(decode_each, token_bytes)
    got = "".join([*(detokenizer.push(byte) for byte in before + cut), detokenizer.flush()])
    assert got == decode_each(before) + REPLACEMENT


ODD_RUNS = st.lists(
    st.tuples(st.sampled_from([0x00, 0x20, 0x61, 0x80, 0xE4, 0xF0, 0x9F, 0xFF]), st.integers(1, 50)), max_size=8
)


def special_is_zero(token_id: int) -> bytes:
    return bytes([token_id]) if token_id else b""


def decode_with_special(token_ids: Sequence[int]) -> str:
    return decode_bytes([i for i in token_ids if i])


def decode_broken_by_special(token_ids: Sequence[int]) -> str:
    """As SentencePiece: a special token between the bytes of a character breaks it."""
    runs = bytes(token_ids).split(b"\0")
    return "".join(run.decode("utf-8", errors="replace") for run in runs).removeprefix(" ")


@given(ODD_RUNS, st.sampled_from([decode_with_special, decode_broken_by_special]))
def test_long_runs_without_a_character_give_what_the_whole_run_gives(
    runs: list[tuple[int, int]], decode: Callable[[Sequence[int]], str]
) -> None:
    detokenizer = Detokenizer(decode, special_is_zero)
    token_ids = [token for token, count in runs for token in [token] * count]
    got = [*(detokenizer.push(token) for token in token_ids), detokenizer.flush()]
    assert "".join(got) == decode(token_ids)


@pytest.mark.parametrize("run", [[0xFF], [0x20], [0], [0xE4, 0], [0xF0, 0x9F], [0x80, 0x20]])
def test_each_token_is_decoded_with_few_others(run: list[int]) -> None:
    """An answer of broken bytes or of spaces took work in proportion to the square of its length."""
    longest = 0

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode_with_special(token_ids)

    detokenizer = Detokenizer(decode, special_is_zero)
    for token in run * 1000:
        detokenizer.push(token)
    assert longest < 50


def test_an_endless_run_of_broken_bytes_is_not_held_back() -> None:
    detokenizer = Detokenizer(decode_bytes, token_bytes)
    shown = "".join(detokenizer.push(0xFF) for _ in range(50))
    assert len(shown) >= 47


@given(st.lists(st.sampled_from([b" you", b" ", b"\n", "好".encode()]), max_size=12), st.text(max_size=8))
def test_what_goes_on_from_other_text_keeps_its_first_space(before: list[bytes], text: str) -> None:
    given_ids = b"".join(before)
    detokenizer = Detokenizer(decode_bytes, token_bytes, given_ids)
    got = "".join([*(detokenizer.push(byte) for byte in text.encode()), detokenizer.flush()])
    assert got == (text if given_ids else text.removeprefix(" "))


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_are_found_wherever_the_text_is_cut(text: str, stop: list[str], data: st.DataObject) -> None:
    found = [(start + len(word), start) for word in stop if (start := text.find(word)) >= 0]
    expected = text[: min(found)[1]] if found else text
    checker = StopStrings(tuple(stop))
    shown = ""
    rest = text
    while rest and not checker.hit:
        size = data.draw(st.integers(1, len(rest)))
        shown += checker.push(rest[:size])
        assert expected.startswith(shown), "something was shown that a stop string takes away"
        rest = rest[size:]
    if not checker.hit:
        shown += checker.flush()
    assert shown == expected
    assert (checker.hit is not None) == bool(found)
