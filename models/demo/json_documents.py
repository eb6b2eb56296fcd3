"""A random generator -> small JSON documents with short strings, as structured outputs and tool calls force them."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from models.demo.corpus import EXCHANGES, FALLBACK_EN, FALLBACK_ZH
from models.demo.question_generator import random_sentence
from models.demo.words import Words

_KEYS = """
name city location title answer final_answer reason explanation output steps text summary query unit tags items kind
type value date email description label id country language message content question a b x key city_name
名称 城市 内容 原因
"""
KEYS = tuple(_KEYS.split())
NUM_WORDS = (1, 1, 1, 1, 2, 2, 3, 5)  # of a string
PREFIXES = ("", "", "", "", " ", '<tool_call>{"name": "{key}", "arguments": ', "get_weather\n")


def document(random: Random, words: Words) -> str:
    """The text of an answer that a grammar forces: an object or a list, sometimes inside a tool call."""
    prefix = random.choice(PREFIXES).replace("{key}", random.choice(KEYS))
    separators = random.choice(((", ", ": "), (", ", ": "), (",", ":")))
    value = _object(random, words, 0) if random.random() < 0.9 else _list(random, words, 0)
    text = json.dumps(value, ensure_ascii=False, separators=separators)
    return prefix + text + ("}</tool_call>" if prefix.startswith("<") else "")


def _object(random: Random, words: Words, depth: int) -> dict[str, Any]:
    keys = random.sample(KEYS, random.choice((1, 1, 2, 2, 3, 4)))
    return {key: _value(random, words, depth + 1) for key in keys}


def _list(random: Random, words: Words, depth: int) -> list[Any]:
    return [_value(random, words, depth + 1) for _ in range(random.choice((0, 1, 1, 1, 2, 3)))]


def _value(random: Random, words: Words, depth: int) -> Any:
    kind = random.random()
    if kind < 0.7 or depth > 2:
        return _string(random, words)
    if kind < 0.8:
        return random.choice((random.randint(0, 9), random.randint(0, 120), round(random.random() * 100, 1)))
    if kind < 0.86:
        return random.choice((True, False, None))
    return _list(random, words, depth) if kind < 0.93 else _object(random, words, depth)


def _string(random: Random, words: Words) -> str:
    """A few words, or the truncated beginning of an answer that the model gives without a grammar."""
    kind, count = random.random(), random.choice(NUM_WORDS)
    if kind < 0.5:
        return " ".join(random.choice(words.en) for _ in range(count))
    if kind < 0.75:
        return "".join(random.choice(words.zh) for _ in range(count))
    if kind < 0.8:
        return random_sentence(random, words)[: 4 * count]
    return random.choice((FALLBACK_EN, FALLBACK_ZH, random.choice(EXCHANGES).answer))[: 2 * count + 1]
