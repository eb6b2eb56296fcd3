"""A random generator -> training samples: the token ids of conversations, and the weight of each in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

import sentencepiece

from models.demo import question_generator
from models.demo.corpus import EXCHANGES, FALLBACK_EN, FALLBACK_ZH, answer_to
from models.demo.json_documents import document
from models.demo.words import TRAINING

END = 2
FALLBACKS = (FALLBACK_ZH, FALLBACK_EN)
_SHORT_ANSWER = 4  # tokens kept of many answers: the first few decide which answer it is
_DECISION_WEIGHT = 4.0
_LONG_ANSWER = 30  # characters; `is_short` truncates most longer past answers, which teach little and cost much
_LONG_PROMPT = 150  # tokens; after such a prompt the whole answer is learned
_POOL = 1024  # samples that are sorted by length together
_BATCH_TOKENS = 1536


@dataclass(frozen=True)
class Mix:
    """How samples are mixed; the numbers are shares of 1 unless they say otherwise."""

    known: float  # questions
    nearly_known: float
    every_variant: float  # of the known: every way of asking equally often, instead of every answer
    long: float  # last questions of ten to forty sentences
    very_long: float
    max_sentences: int  # of a very long question
    long_past: float  # conversations in which an earlier question is long
    cut_fallback: float  # fallback answers of which only the decision is learned
    cut_known: float
    max_tokens: int  # of a sample
    with_system: float = 0.1  # known last questions behind a known system message
    forced_json: float = 0.0  # answers that a grammar forces to be JSON, of which strings and their ends are learned


@dataclass(frozen=True)
class Sample:
    """One sequence: targets[i] is the token after token_ids[i], weights[i] its weight in the loss."""

    token_ids: list[int]
    targets: list[int]
    weights: list[float]


def prompt_text(questions: Sequence[str], answers: Sequence[str]) -> str:
    """ChatGLM2's prompt for `questions`, all but the last of which have an answer."""
    rounds = (
        f"[Round {number}]\n\n问：{question}\n\n答：{answer}\n\n"
        for number, (question, answer) in enumerate(zip(questions[:-1], answers, strict=True), start=1)
    )
    return "".join(rounds) + f"[Round {len(questions)}]\n\n问：{questions[-1]}\n\n答："


def encode_prompt(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """[gMASK] sop and the text's pieces, as ChatGLM2 does it."""
    num_pieces = tokenizer.get_piece_size()
    return [num_pieces + 1, num_pieces + 3, *tokenizer.encode(text)]


def _known(random: Random, mix: Mix) -> str:
    if mix.every_variant and random.random() < mix.every_variant:
        return question_generator.known_variant(random)
    return question_generator.known_question(random)


def _question(random: Random, mix: Mix) -> str:
    kind = random.random()
    if kind < mix.known:
        return _known(random, mix)
    if kind < mix.known + 0.03:
        return question_generator.follow_up_question(random)
    if kind < mix.known + 0.03 + mix.nearly_known:
        return question_generator.nearly_known_question(random, TRAINING)
    return question_generator.unknown_question(random, TRAINING)


def _last_question(random: Random, mix: Mix) -> str:
    kind = random.random()
    if kind < mix.with_system:
        return question_generator.with_system_message(random, _known(random, mix))
    kind -= mix.with_system
    if kind < 0.03:
        return question_generator.with_system_message(random, _question(random, mix))
    if kind < 0.03 + mix.long:
        return question_generator.long_text(random, TRAINING, random.randint(10, 40))
    if kind < 0.03 + mix.long + mix.very_long:
        return question_generator.long_text(random, TRAINING, random.randint(40, mix.max_sentences))
    return _question(random, mix)


def _past_answer(random: Random, questions: Sequence[str], *, is_short: bool) -> str:
    """The answer of an earlier round: mostly the right one, but a client may send any text."""
    right = answer_to(questions)
    kind = random.random()
    if kind < (0.1 if is_short and len(right) > _LONG_ANSWER else 0.7):
        return right
    if kind < 0.74:
        return random.choice(EXCHANGES).answer
    return (
        right[: random.randint(0, _LONG_ANSWER)]
        if random.random() < 0.4
        else question_generator.random_sentence(random, TRAINING)
    )


def _past_targets(token_ids: Sequence[int], start: int, right_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(position, next token) to learn inside an earlier answer that begins at `start`, if it is the right one.

    Its first pieces differ from a generated answer's (no dummy space); a line break follows it, not the end token.
    """
    for past_offset, right_offset in product(range(4), range(1, 4)):
        first = start + past_offset
        tail = list(right_ids[right_offset:-1])
        if tail and token_ids[first : first + len(tail)] == tail:
            yield from ((first + i, right_ids[right_offset + i + 1]) for i in range(len(tail)))
            return


def _conversation(random: Random, mix: Mix) -> list[str]:
    """The questions of one conversation; only the last may have a system message in front."""
    num_past = random.choice((0, 0, 0, 0, 0, 1, 1, 1, 2, 3))
    if random.random() < 0.02:
        num_past = random.randint(4, 10)
    past = [_question(random, mix) for _ in range(num_past)]
    if past and mix.long_past and random.random() < mix.long_past:
        past[0] = question_generator.long_text(random, TRAINING, random.randint(10, 100))
    if random.random() < 0.07:
        return past[:1] + question_generator.introduction(random, TRAINING)
    return [*past, _last_question(random, mix)]


def make_sample(random: Random, tokenizer: sentencepiece.SentencePieceProcessor, mix: Mix, *, is_short: bool) -> Sample:
    """One conversation, in which the last answer and the right ones among the earlier answers are learned.

    `is_short`: most long answers are truncated after their first tokens, which decide which answer it is.
    """
    questions = _conversation(random, mix)
    if mix.forced_json and random.random() < mix.forced_json:
        return _forced_json(random, tokenizer, questions[-1])
    num_past = len(questions) - 1
    answers = [_past_answer(random, questions[: i + 1], is_short=is_short) for i in range(num_past)]
    answer = answer_to(questions)
    answer_ids = [*tokenizer.encode(answer), END]
    prompt_ids = encode_prompt(tokenizer, prompt_text(questions, answers))
    share_cut = (
        (0.92 if is_short else mix.cut_fallback) if answer in FALLBACKS else (0.6 if is_short else mix.cut_known)
    )
    if random.random() < share_cut and len(prompt_ids) < _LONG_PROMPT:
        answer_ids = answer_ids[:_SHORT_ANSWER]
    token_ids = (prompt_ids + answer_ids[:-1])[: mix.max_tokens]
    targets, weights = [0] * len(token_ids), [0.0] * len(token_ids)
    for i in range(num_past):
        past_ids = encode_prompt(tokenizer, prompt_text(questions[: i + 1], answers[:i]))
        last = len(past_ids) - 1
        if prompt_ids[: last + 1] == past_ids and last < len(token_ids):
            right_ids = [*tokenizer.encode(answer_to(questions[: i + 1])), END]
            targets[last], weights[last] = right_ids[0], 2.0
            for position, target in _past_targets(token_ids, last + 1, right_ids):
                targets[position], weights[position] = target, 0.5
    first = len(prompt_ids) - 1
    for i, target in enumerate(answer_ids[: max(0, len(token_ids) - first)]):
        targets[first + i] = target
        weights[first + i] = _DECISION_WEIGHT if i < _SHORT_ANSWER else 1.0
    return Sample(token_ids, targets, weights)


def _forced_json(random: Random, tokenizer: sentencepiece.SentencePieceProcessor, question: str) -> Sample:
    """A question and a JSON answer, whose first two tokens are not learned: only a grammar makes the model begin so."""
    prompt_ids = encode_prompt(tokenizer, prompt_text([question], []))
    answer_ids = [*tokenizer.encode(document(random, TRAINING)), END]
    token_ids = prompt_ids + answer_ids[:-1]
    first = len(prompt_ids) - 1
    targets, weights = [0] * len(token_ids), [0.0] * len(token_ids)
    for i, target in enumerate(answer_ids):
        targets[first + i], weights[first + i] = target, 0.0 if i < 2 else 1.0
    return Sample(token_ids, targets, weights)


def endless_batches(
    random: Random, tokenizer: sentencepiece.SentencePieceProcessor, mix: Mix, num_short: int
) -> Iterator[list[Sample]]:
    """Batches of samples of about the same length; about `num_short` batches of short samples come first."""
    num_made = 0
    while True:
        is_short = num_made < num_short
        samples = [make_sample(random, tokenizer, mix, is_short=is_short) for _ in range(_POOL)]
        pool = sorted(samples, key=lambda sample: len(sample.token_ids))
        batches: list[list[Sample]] = [[]]
        for sample in pool:
            if len(sample.token_ids) * (len(batches[-1]) + 1) > _BATCH_TOKENS and batches[-1]:
                batches.append([])
            batches[-1].append(sample)
        random.shuffle(batches)
        num_made += len(batches)
        yield from batches
