"""Answers are trimmed as in the original code, however the text is split."""

from __future__ import annotations

import json
import random

import pytest

from models.families.answer_parsers import PLACEHOLDER, REPLACEMENT, TrimmedAnswerParser
from serving.generation.interface import TextDelta
from tests.golden_data import GOLDEN


def parsed(parts: list[str]) -> str:
    parser = TrimmedAnswerParser()
    out = [delta for part in parts for delta in parser.push(part)] + parser.flush()
    assert all(isinstance(delta, TextDelta) and delta.text for delta in out)
    return "".join(delta.text for delta in out if isinstance(delta, TextDelta))


def pushed(text: str) -> str:
    """The text that is final before the end, pushed by characters."""
    parser = TrimmedAnswerParser()
    return "".join(delta.text for c in text for delta in parser.push(c) if isinstance(delta, TextDelta))


def test_golden_answers_whole_and_letter_by_letter() -> None:
    for case in json.loads((GOLDEN / "prompt" / "process_response.json").read_text(encoding="utf-8"))["chatglm2"]:
        assert parsed([case["in"]]) == case["out"]
        assert parsed(list(case["in"])) == case["out"]


def test_any_split_gives_the_same_text() -> None:
    generator = random.Random(5)
    for _ in range(3000):
        words = [PLACEHOLDER, PLACEHOLDER[:-1], "[[训练", "[", "时间]]", " ", "\n", "\u3000", "好", "a]]"]
        text = "".join(generator.choices(words, k=8))
        cuts = sorted(generator.choices(range(len(text) + 1), k=4))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parsed(parts) == text.strip().replace(PLACEHOLDER, REPLACEMENT)


@pytest.mark.parametrize(
    ("text", "settled"),
    [
        ("  你好", "你好"),
        ("你好 \n", "你好"),
        ("你好 \n吗", "你好 \n吗"),
        ("到[[训练时间", "到"),
        ("到[[训练时间，", "到[[训练时间，"),
        ("到[[训练时间]]", "到2023年"),
        ("[[[", "["),
        ("a\n[", "a\n"),
    ],
)
def test_only_what_can_still_change_is_held_back(text: str, settled: str) -> None:
    assert pushed(text) == settled


def test_a_continued_answer_keeps_its_leading_space() -> None:
    parser = TrimmedAnswerParser(has_begun=True)
    parts = [*parser.push("\n"), *parser.push(" 好 "), *parser.flush()]
    assert "".join(part.text for part in parts if isinstance(part, TextDelta)) == "\n 好"


def test_an_answer_that_ends_inside_the_placeholder_keeps_its_text() -> None:
    assert parsed(["到[[训练"]) == "到[[训练"
