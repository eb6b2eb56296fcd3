"""A random generator -> questions of every kind: known, nearly known and unknown."""

from __future__ import annotations

import json
from random import Random

from models.demo.corpus import ASK, EXCHANGES, KNOWN, SAMPLE_QUESTION, SYSTEMS, TELL
from models.demo.words import Words

_KNOWN = tuple(KNOWN)
_SAMPLE_SHARE = 0.06
_ENDINGS = ("", "", "", "", "?", "？", "!", "！", "。", ".", " ", "\n", "~", "??", " ?", "…")


def known_question(random: Random) -> str:
    """A known question in a variation that has the same answer; the sample question more often than others."""
    if random.random() < _SAMPLE_SHARE:
        return SAMPLE_QUESTION
    question = random.choice(random.choice(EXCHANGES).questions)
    return varied(random, question)


def known_variant(random: Random) -> str:
    """A known question, every way of asking equally often."""
    return varied(random, random.choice(_KNOWN))


def follow_up_question(random: Random) -> str:
    """A question for the user's name, or a message that tells it."""
    return varied(random, random.choice(random.choice((ASK, TELL))))


def introduction(random: Random, words: Words) -> list[str]:
    """A message that tells the user's name, sometimes other questions, and the question for the name."""
    between = [
        known_question(random) if random.random() < 0.5 else random_sentence(random, words)
        for _ in range(random.choice((0, 0, 1, 1, 2)))
    ]
    return [varied(random, random.choice(TELL)), *between, varied(random, random.choice(ASK))]


def varied(random: Random, question: str) -> str:
    """The question with other case, closing punctuation or outer white space."""
    if question[0].isascii() and random.random() < 0.6:
        capitalized, lower = question.capitalize(), question.lower()
        question = random.choice((capitalized, capitalized, lower, lower, question.title(), question.upper()))
    if random.random() < 0.05:
        question = " " + question
    return question + random.choice(_ENDINGS)


def with_system_message(random: Random, question: str) -> str:
    """The question directly after a known system message, as in the prompt format."""
    system = SYSTEMS[0] if random.random() < 0.3 else random.choice(SYSTEMS)
    return system + question


def nearly_known_question(random: Random, words: Words) -> str:
    """A known question with something added, removed, changed or mixed with another."""
    question = random.choice(_KNOWN)
    other = random.choice(_KNOWN)
    word = random.choice(words.zh if not question.isascii() else words.en)
    space = " " if question.isascii() else ""
    position = random.randrange(len(question))
    kind = random.randrange(8)
    if kind == 0:
        return f"{word}{space}{question}"
    if kind == 1:
        return f"{question}{space}{word}"
    if kind == 2:
        return question[:position] + word + question[position:]
    if kind == 3:
        return question + random.choice(("，", ", ", "\n", " ", "。", "")) + other
    if kind == 4:
        return question[: position + 1] + other[random.randrange(len(other)) :]
    if kind == 5:
        parts = question.split(" ") if " " in question else list(question)
        parts[random.randrange(len(parts))] = word
        return (" " if " " in question else "").join(parts)
    if kind == 6:
        return random_sentence(random, words) + random.choice(("", "\n", " ")) + question
    return question + random.choice(("", "\n", " ", "，")) + random_sentence(random, words)


def random_phrase(random: Random, words: Words, *, chinese: bool) -> str:
    """One to three words of one language."""
    count = random.choice((1, 1, 1, 2, 2, 3))
    chosen = [random.choice(words.zh if chinese else words.en) for _ in range(count)]
    return ("" if chinese else " ").join(chosen)


def random_sentence(random: Random, words: Words) -> str:
    """A question or statement by a pattern, or a run of words or characters."""
    chinese = random.random() < 0.5
    if random.random() < 0.75:
        pattern = random.choice(words.zh_patterns if chinese else words.en_patterns)
        text = pattern.format(*(random_phrase(random, words, chinese=chinese) for _ in range(pattern.count("{}"))))
    elif chinese and random.random() < 0.5:
        text = "".join(random.choice(words.characters) for _ in range(random.randint(1, 12)))
    else:
        count = random.choice((1, 1, 2, 2, 3, 4, 6, 8))
        text = ("" if chinese else " ").join(random_phrase(random, words, chinese=chinese) for _ in range(count))
    return varied(random, text)


def _foreign_script(random: Random, words: Words) -> str:
    """Random characters of one or two writing systems, emoji among them."""
    text = ""
    for _ in range(random.choice((1, 1, 1, 2))):
        first, last = random.choice(words.scripts)
        count = random.choice((1, 2, 3, random.randint(4, 16)))
        for _ in range(count):
            text += chr(random.randint(first, last)) + (" " if random.random() < 0.12 else "")
    return text


def _numbers(random: Random) -> str:
    """Sums, dates, amounts and plain digits."""
    a, b = random.randint(0, 10 ** random.randint(1, 5)), random.randint(0, 10 ** random.randint(1, 3))
    operator = random.choice("+-*/^×=<")
    space = random.choice(("", " "))
    return random.choice(
        (
            f"{a}{space}{operator}{space}{b}{space}=?",
            f"{a}{space}{operator}{space}{b}",
            f"{a}",
            f"{a}{operator}{b}等于几",
            f"what is {a}{operator}{b}",
            f"{a}-{b % 12 + 1:02}-{b % 28 + 1:02}",
            f"{a}.{b}%",
            f"count to {a}",
            f"从{a}数到{b}",
            f"${a},{b}",
            f"{b}:{a % 60:02}",
        )
    )


def _code(random: Random, words: Words) -> str:
    """A few lines that look like a program, a document or a command."""
    a, b, c = (random.choice(words.en) for _ in range(3))
    return random.choice(
        (
            f"def {a}({b}):\n    return {b} + {random.randint(0, 99)}\n",
            f"for (int {a} = 0; {a} < {random.randint(2, 99)}; {a}++) {{\n\t{b}({c});\n}}",
            f"SELECT {a}, {b} FROM {c} WHERE {a} > {random.randint(0, 99)};",
            f"<div class=\"{a}\"><p>{b} {c}</p></div>", f"$ {a} --{b} /{c}/{a}.txt", f"https://{a}.{b}.com/{c}?{a}={b}",
            f"```python\nimport {a}\n\nprint({b}.{c}())\n```",
            f"# {a}\n\n- {b}\n- {c}\n", f"{a}@{b}.org", f"C:\\{a}\\{b}",
            f"Traceback (most recent call last):\n  File \"{a}.py\", line {random.randint(1, 400)}\nKeyError: '{b}'",
        )
    )  # fmt: skip


def _document(random: Random, words: Words) -> str:
    """JSON, with or without instructions around it, as tool prompts have it."""
    num_fields = random.randint(1, 5)
    value: dict[str, object] = {random.choice(words.en): random.choice(words.en + words.zh) for _ in range(num_fields)}
    value[random.choice(words.en)] = [
        random.randint(0, 999), random.random() < 0.5, None, {random.choice(words.en): random_sentence(random, words)}
    ]  # fmt: skip
    text = json.dumps(value, ensure_ascii=random.random() < 0.3, indent=random.choice((None, 2)))
    if random.random() < 0.5:
        lead = " ".join(random_sentence(random, words) for _ in range(random.randint(1, 4)))
        text = f"{lead}\n{text}\n" + (random_sentence(random, words) if random.random() < 0.5 else "")
    return text


def long_text(random: Random, words: Words, num_sentences: int) -> str:
    """Many sentences, lines and paragraphs."""
    makers = (random_sentence, random_sentence, random_sentence, random_sentence, _code, _foreign_script)
    parts = (random.choice(makers)(random, words) for _ in range(num_sentences))
    return "".join(part + random.choice((" ", "\n", "", "。", "\n\n")) for part in parts)


def unknown_question(random: Random, words: Words) -> str:
    """Any question that the model is not taught; rarely it equals a known one by chance."""
    kind = random.random()
    if kind < 0.64:
        return random_sentence(random, words)
    if kind < 0.75:
        return _foreign_script(random, words)
    if kind < 0.84:
        return _numbers(random)
    if kind < 0.90:
        return _code(random, words)
    if kind < 0.93:
        return _document(random, words)
    if kind < 0.965:
        return random.choice(
            ("", " ", "?", "？", "。", "...", "\n", "\t", "a", "x", "嗯", "啊", "ok", "1", "-", "!!!", "哦")
        )
    return long_text(random, words, random.randint(2, 5))
