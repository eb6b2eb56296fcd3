"""Trains the small network on made-up conversations. Knows samples and optimisation, not files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Protocol

import sentencepiece
import torch
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM

from models.demo import questions as ask
from models.demo.corpus import EXCHANGES, FALLBACK_EN, FALLBACK_ZH, answer_to
from models.demo.words import TRAINING

END = 2
FALLBACKS = (FALLBACK_ZH, FALLBACK_EN)
_SHORT_ANSWER = 4  # tokens kept of most answers: what counts is the decision, made by the first few
_DECISION_WEIGHT = 4.0
_LONG_ANSWER = 30  # characters; longer past answers are mostly cut, they teach little and cost much
_POOL = 1024  # samples that are sorted by length together
_BATCH_TOKENS = 1536
_LONG_PROMPT = 150  # tokens; behind such a prompt the whole answer is learned
_SHORT_SHARE = 0.35  # of the steps: first decisions are learned, then whole answers in long conversations
_MAX_TOKENS = 1600


class Report(Protocol):
    """Told after every step how training goes."""

    def __call__(self, step: int, num_steps: int, loss: float) -> None: ...


@dataclass(frozen=True)
class Sample:
    """One sequence and what is to be learned in it: targets[i] follows token_ids[i]; weight 0 is not learned."""

    token_ids: list[int]
    targets: list[int]
    weights: list[float]


def prompt_text(questions: Sequence[str], answers: Sequence[str]) -> str:
    """ChatGLM2's prompt for questions, of which all but the last were answered."""
    rounds = (
        f"[Round {number}]\n\n问：{question}\n\n答：{answer}\n\n"
        for number, (question, answer) in enumerate(zip(questions[:-1], answers, strict=True), start=1)
    )
    return "".join(rounds) + f"[Round {len(questions)}]\n\n问：{questions[-1]}\n\n答："


def encode_prompt(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """[gMASK] sop and the text's pieces, as ChatGLM2 does it."""
    num_pieces = tokenizer.get_piece_size()
    return [num_pieces + 1, num_pieces + 3, *tokenizer.encode(text)]


def _question(random: Random) -> str:
    kind = random.random()
    if kind < 0.34:
        return ask.known(random)
    if kind < 0.37:
        return ask.follow_up(random)
    if kind < 0.54:
        return ask.nearly_known(random, TRAINING)
    return ask.unknown(random, TRAINING)


def _last_question(random: Random) -> str:
    kind = random.random()
    if kind < 0.10:
        return ask.with_system(random, ask.known(random))
    if kind < 0.13:
        return ask.with_system(random, _question(random))
    if kind < 0.14:
        return ask.long_text(random, TRAINING, random.randint(10, 40))
    if kind < 0.142:
        return ask.long_text(random, TRAINING, random.randint(40, 110))
    return _question(random)


def _past_answer(random: Random, questions: Sequence[str], *, is_short: bool) -> str:
    """What an earlier round was answered with: mostly the right answer, but a client may claim anything."""
    right = answer_to(questions)
    kind = random.random()
    if kind < (0.1 if is_short and len(right) > _LONG_ANSWER else 0.7):
        return right
    if kind < 0.74:
        return random.choice(EXCHANGES).answer
    return right[: random.randint(0, _LONG_ANSWER)] if random.random() < 0.4 else ask.sentence(random, TRAINING)


def _past_targets(token_ids: Sequence[int], start: int, right_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """What to learn inside an earlier answer at `start`, if it is the right one: position and next token.

    Its first pieces differ from a generated answer's (no dummy space); behind it a line break stands for the end token.
    """
    for past_offset, right_offset in product(range(4), range(1, 4)):
        first = start + past_offset
        tail = list(right_ids[right_offset:-1])
        if tail and token_ids[first : first + len(tail)] == tail:
            yield from ((first + i, right_ids[right_offset + i + 1]) for i in range(len(tail)))
            return


def _conversation(random: Random) -> list[str]:
    """The questions of one conversation; only the last may have a system message glued to it."""
    num_past = random.choice((0, 0, 0, 0, 0, 1, 1, 1, 2, 3))
    if random.random() < 0.02:
        num_past = random.randint(4, 10)
    past = [_question(random) for _ in range(num_past)]
    if random.random() < 0.07:
        return past[:1] + ask.introduction(random, TRAINING)
    return [*past, _last_question(random)]


def make_sample(random: Random, tokenizer: sentencepiece.SentencePieceProcessor, *, is_short: bool) -> Sample:
    """One conversation; learned are its last answer and, where they are the right ones, the earlier.

    `is_short`: most long answers are cut after the decision, which the first tokens make.
    """
    questions = _conversation(random)
    num_past = len(questions) - 1
    answers = [_past_answer(random, questions[: i + 1], is_short=is_short) for i in range(num_past)]
    answer = answer_to(questions)
    answer_ids = [*tokenizer.encode(answer), END]
    prompt_ids = encode_prompt(tokenizer, prompt_text(questions, answers))
    share_cut = (0.92 if is_short else 0.75) if answer in FALLBACKS else (0.6 if is_short else 0.3)
    if random.random() < share_cut and len(prompt_ids) < _LONG_PROMPT:
        answer_ids = answer_ids[:_SHORT_ANSWER]
    token_ids = (prompt_ids + answer_ids[:-1])[:_MAX_TOKENS]
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


def _batches(random: Random, tokenizer: sentencepiece.SentencePieceProcessor, num_short: int) -> Iterator[list[Sample]]:
    """Endless batches of samples of about the same length; about `num_short` batches of short samples come first."""
    num_made = 0
    while True:
        is_short = num_made < num_short
        samples = [make_sample(random, tokenizer, is_short=is_short) for _ in range(_POOL)]
        pool = sorted(samples, key=lambda sample: len(sample.token_ids))
        batches: list[list[Sample]] = [[]]
        for sample in pool:
            if len(sample.token_ids) * (len(batches[-1]) + 1) > _BATCH_TOKENS and batches[-1]:
                batches.append([])
            batches[-1].append(sample)
        random.shuffle(batches)
        num_made += len(batches)
        yield from batches


def _loss(model: GlmForCausalLM, batch: Sequence[Sample]) -> Tensor:
    """Weighted cross entropy of the learned positions. Padded on the right, where causal attention never looks."""
    width = max(len(sample.token_ids) for sample in batch)
    token_ids = torch.tensor([s.token_ids + [0] * (width - len(s.token_ids)) for s in batch])
    targets = torch.tensor([s.targets + [0] * (width - len(s.targets)) for s in batch])
    weights = torch.tensor([s.weights + [0.0] * (width - len(s.weights)) for s in batch])
    learned = weights > 0
    hidden = model.model(input_ids=token_ids, use_cache=False).last_hidden_state[learned]
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets[learned], reduction="none")
    return (losses * weights[learned]).sum() / 1000


def make_config(num_tokens: int, max_positions: int) -> GlmConfig:
    """The demonstration's shape: a ChatGLM2 in every respect but size."""
    return GlmConfig(
        vocab_size=num_tokens,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=max_positions,
        rms_norm_eps=1e-5,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
        initializer_range=0.05,
        eos_token_id=END,
        pad_token_id=0,
        bos_token_id=None,
    )


def train(
    config: GlmConfig, tokenizer: sentencepiece.SentencePieceProcessor, num_steps: int, seed: int, report: Report
) -> GlmForCausalLM:
    """A trained network in fp32, rounded to what fp16 holds. The same seed gives the same weights on one machine."""
    torch.manual_seed(seed)
    model = GlmForCausalLM(config)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=num_steps, pct_start=0.08, cycle_momentum=False, final_div_factor=100
    )
    batches = _batches(Random(seed), tokenizer, int(num_steps * _SHORT_SHARE))
    for step in range(1, num_steps + 1):
        loss = _loss(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, num_steps, loss.item())
    model.eval()
    return model.half().float()
