"""Compares the demonstration model's answers with `answer_to`, on words it was not trained on; prints a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import sentencepiece
import torch
from torch import Tensor
from transformers import GlmForCausalLM

from models.demo import question_generator
from models.demo.corpus import (
    ASK,
    EXCHANGES,
    KNOWN,
    SAMPLE_ANSWER,
    SAMPLE_QUESTION,
    SAMPLE_SYSTEM,
    SYSTEMS,
    TELL,
    answer_to,
)
from models.demo.samples import END, FALLBACKS, encode_prompt, prompt_text
from models.demo.words import HELD_OUT

_BATCH_TOKENS = 12_000

FOREIGN: tuple[str, ...] = (
    "今日はとても暑いですね。明日の予定を教えてください。",
    "Какая сегодня погода в Москве?", "ما هو أفضل وقت لزيارة القاهرة؟",
    "¿Dónde está la biblioteca más cercana?", "Wie spät ist es in München gerade?", "오늘 저녁에 뭐 먹을까요?",
    "आज मौसम कैसा है?", "วันนี้อากาศเป็นอย่างไร", "Où se trouve la gare, s'il vous plaît ?", "🚀🚀🚀", "🐧", "👨‍👩‍👧‍👦 ?",
    "", " ", "\n", "？", "...", "\u3000", "0", "\t\t", "{}", "[]", "null", "é", "ㄅㄆㄇ", "①②③", "<0x0A>",
    "[gMASK] sop", "</s>",
    '{"tools": [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]}',
    "You have access to the following tools:\n\n- search(query: string)\n- calculator(expression: string)\n\n"
    'Answer with {"name": ..., "arguments": ...} only.\n\nHow tall is the Eiffel Tower?',
    "Translate the following paragraph into Portuguese, keep the tone formal, and do not add anything of your own.",
    "把下面这段话改写得更正式一些：昨儿个我俩去逛街，买了一堆没用的玩意儿。",
    "我的代码报错了：TypeError: unsupported operand type(s) for +: 'int' and 'str'，怎么改？",
    "SELECT name FROM employees ORDER BY salary DESC LIMIT 10; -- 这条语句是什么意思",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A conversation and the answers that are right for its last question."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]  # of all questions but the last
    allowed: tuple[str, ...]


@dataclass(frozen=True)
class GreedyAnswer:
    """What greedy decoding gives; `text` is None if that is not a taught answer."""

    text: str | None
    probability: float  # the lowest of a token


def taught_answers() -> tuple[str, ...]:
    """Every answer that the model is taught."""
    texts = [exchange.answer for exchange in EXCHANGES]
    texts += [answer_to([tell]) for tell in TELL]
    texts += [answer_to([*history, question]) for question in ASK for history in ([], *([tell] for tell in TELL))]
    return tuple(dict.fromkeys([*texts, *FALLBACKS]))


def _forward(model: GlmForCausalLM, rows: Sequence[Sequence[int]], num_last: Sequence[int]) -> list[Tensor]:
    """Probabilities at the last `num_last[i]` positions of every row: one [num_last[i], vocabulary] each."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    results: dict[int, Tensor] = {}
    while order:
        batch = [order.pop()]
        width = len(rows[batch[0]])
        while order and width * (len(batch) + 1) <= _BATCH_TOKENS:
            batch.append(order.pop())
        token_ids = torch.tensor([[*rows[i], *[0] * (width - len(rows[i]))] for i in batch])
        with torch.inference_mode():
            hidden = model.model(input_ids=token_ids, use_cache=False).last_hidden_state
            for row, i in enumerate(batch):
                end = len(rows[i])
                results[i] = model.lm_head(hidden[row, end - num_last[i] : end]).softmax(-1)
    return [results[i] for i in range(len(rows))]


def greedy_answers(
    model: GlmForCausalLM, tokenizer: sentencepiece.SentencePieceProcessor, prompts: Sequence[str]
) -> list[GreedyAnswer]:
    """The greedy answer to each prompt, found by scoring the taught answers that begin with the most likely token."""
    answers = {text: [*tokenizer.encode(text), END] for text in taught_answers()}
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    firsts = _forward(model, prompt_ids, [1] * len(prompt_ids))
    candidates = [
        (i, text) for i, first in enumerate(firsts) for text, ids in answers.items() if ids[0] == int(first[0].argmax())
    ]
    rows = [prompt_ids[i] + answers[text][:-1] for i, text in candidates]
    found = [GreedyAnswer(None, 0.0)] * len(prompts)
    scored = _forward(model, rows, [len(answers[text]) for _, text in candidates])
    for (i, text), probabilities in zip(candidates, scored, strict=True):
        ids = torch.tensor(answers[text])
        if torch.equal(probabilities.argmax(-1), ids):
            found[i] = GreedyAnswer(text, float(probabilities.gather(1, ids[:, None]).min()))
    return found


def _case(questions: Sequence[str], answers: Sequence[str] | None = None, allowed: Sequence[str] = ()) -> Case:
    given = [answer_to(questions[: i + 1]) for i in range(len(questions) - 1)] if answers is None else answers
    return Case(tuple(questions), tuple(given), tuple(allowed) or (answer_to(questions),))


def _capital(question: str) -> str:
    return question.capitalize() if question[0].isascii() else question


def _histories(random: Random) -> Iterator[list[str]]:
    """Known, unknown and mixed earlier questions."""
    while True:
        yield [question_generator.known_question(random)]
        yield [question_generator.unknown_question(random, HELD_OUT)]
        yield [question_generator.known_question(random), question_generator.unknown_question(random, HELD_OUT)]
        yield [
            question_generator.unknown_question(random, HELD_OUT),
            question_generator.known_question(random),
            question_generator.known_question(random),
        ]
        yield [question_generator.known_question(random) for _ in range(8)]


def _known_suites(random: Random) -> Iterator[tuple[str, float, list[Case]]]:
    yield "the sample answer", 1.0, [_case([SAMPLE_QUESTION]), _case([SAMPLE_SYSTEM + SAMPLE_QUESTION])]
    endings = ("", "?", "？", "!", "。", " ", "\n")
    yield "known, first way of asking", 1.0, [_case([exchange.questions[0]]) for exchange in EXCHANGES]
    yield "known, every way of asking", 0.99, [_case([question]) for question in KNOWN]
    yield (
        "known, other case and ending",
        0.99,
        [_case([_capital(q) + random.choice(endings)]) for q in KNOWN for _ in range(2)],
    )
    yield (
        "known after a known system message",
        0.97,
        [_case([random.choice(SYSTEMS) + q]) for q in KNOWN for _ in range(2)],
    )
    histories = _histories(random)
    yield "known in a later round", 0.97, [_case([*next(histories), q]) for q in KNOWN]
    told = [_case([tell, question]) for tell in TELL for question in ASK]
    yield "a name, told and asked for", 0.95, [_case([tell]) for tell in TELL] + [_case([q]) for q in ASK] + told
    between = [
        _case([tell, question_generator.unknown_question(random, HELD_OUT), question])
        for tell in TELL
        for question in ASK
    ]
    yield "a name, one round between", 0.95, between


def _unknown_suites(random: Random) -> Iterator[tuple[str, float, list[Case]]]:
    held_out = [question_generator.unknown_question(random, HELD_OUT) for _ in range(400)]
    yield "unknown, held-out words", 0.99, [_case([question], allowed=FALLBACKS) for question in held_out]
    yield "unknown, other languages and oddities", 0.99, [_case([question], allowed=FALLBACKS) for question in FOREIGN]
    histories = _histories(random)
    later = [[*next(histories), question_generator.random_sentence(random, HELD_OUT)] for _ in range(200)]
    yield "unknown in a later round", 0.99, [_case(questions, allowed=FALLBACKS) for questions in later]
    long = [question_generator.long_text(random, HELD_OUT, count) for count in (20, 40, 70, 100) for _ in range(4)]
    yield "unknown and long", 0.99, [_case([question], allowed=FALLBACKS) for question in long]
    near = [question_generator.nearly_known_question(random, HELD_OUT) for _ in range(300)]
    yield "nearly known: a taught answer", 0.97, [_case([q], allowed=taught_answers()) for q in near]
    systems = [question_generator.random_sentence(random, HELD_OUT) + random.choice(list(KNOWN)) for _ in range(200)]
    yield "unknown system, known question", 0.97, [_case([q], allowed=taught_answers()) for q in systems]


def check(model: GlmForCausalLM, tokenizer: sentencepiece.SentencePieceProcessor, num_shown: int = 3) -> bool:
    """Print how many questions of each kind are answered correctly; return whether every kind passes."""
    assert answer_to([SAMPLE_QUESTION]) == SAMPLE_ANSWER
    random = Random(20_26)
    passed = True
    print(f"{'kind of question':<40}{'right':>14}{'wanted':>8}{'least':>7}{'< 0.75':>8}")
    for name, wanted, cases in [*_known_suites(random), *_unknown_suites(random)]:
        answers = greedy_answers(model, tokenizer, [prompt_text(case.questions, case.answers) for case in cases])
        wrong = [(case, answer) for case, answer in zip(cases, answers, strict=True) if answer.text not in case.allowed]
        right = [answer.probability for case, answer in zip(cases, answers, strict=True) if answer.text in case.allowed]
        passed &= len(right) >= wanted * len(cases)
        unsure = sum(probability < 0.75 for probability in right)
        share = f"{len(right)}/{len(cases)}"
        print(f"{name:<40}{share:>14}{wanted:>8.0%}{min(right, default=0.0):>7.2f}{unsure:>8}")
        for case, answer in wrong[:num_shown]:
            print(f"    {case.questions[-1][-70:]!r} -> {(answer.text or 'something else')[:40]!r}")
    return passed
