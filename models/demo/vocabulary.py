"""The demonstration's texts -> its SentencePiece model, trained with ChatGLM2's own settings."""

from __future__ import annotations

import io
from random import Random

import sentencepiece

from models.demo.corpus import EXCHANGES, FALLBACK_EN, FALLBACK_ZH, KNOWN, SYSTEMS, answer_to
from models.demo.question_generator import random_sentence
from models.demo.words import TRAINING

NUM_PIECES = 2048
_ANSWER_REPEATS = 6
_QUESTION_REPEATS = 10
_OPENING_REPEATS = 100  # so that an answer's first piece differs from those of the others
_NUM_SENTENCES = 2000


def _opening(answer: str) -> str:
    """The first word of an answer, or its first two characters in Chinese."""
    return answer.split(" ")[0] if answer[0].isascii() else answer[:2]


def _lines() -> list[str]:
    """The training text, the same on every machine.

    Answers are repeated, so that they get long pieces. Rare characters are removed, so that they become byte pieces, as
    emoji are in ChatGLM2.
    """
    random = Random(2)
    texts = [exchange.answer for exchange in EXCHANGES] + [FALLBACK_ZH, FALLBACK_EN]
    texts += [answer_to([question]) for question in ("我叫什么名字", "what is my name", "我叫小明", "my name is Bob")]
    texts = texts * _ANSWER_REPEATS + [_opening(text) for text in texts] * _OPENING_REPEATS
    texts += [f"问：{question}" for question in KNOWN] * _QUESTION_REPEATS
    texts += [*SYSTEMS, *TRAINING.zh, *TRAINING.en, TRAINING.characters, *(chr(code) for code in range(33, 127))]
    for _ in range(_NUM_SENTENCES):
        texts.append(f"[Round {random.randint(1, 9)}]")
        texts.append(f"问：{random_sentence(random, TRAINING)}")
        texts.append(f"答：{random_sentence(random, TRAINING)}")
    common = (0x20, 0x7F), (0x3000, 0x30FF), (0x3400, 0x9FFF), (0xFF00, 0xFFEF), (0x2010, 0x2026)
    return [
        "".join(character for character in line if any(a <= ord(character) < b for a, b in common))
        for text in texts
        for line in text.split("\n")
        if line.strip()
    ]


def train_vocabulary() -> bytes:
    """The bytes of a `tokenizer.model`: 2,048 pieces, without the five specials that ChatGLM2's code appends."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_lines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=NUM_PIECES,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        max_sentencepiece_length=8,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
