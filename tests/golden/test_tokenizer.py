"""The tokenizer gives the ids and the text of the original."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from models.families.chatglm2 import ChatGLM2Format
from models.families.chatglm3 import NUM_ROLES
from models.family import ImportRefused
from models.tokenizers.sentencepiece import NUM_SPECIALS, SentencePieceTokenizer, open_for_import
from serving.generation.interface import PromptError
from tests.golden_data import CHATGLM2_TOKENIZER, GOLDEN, needs_chatglm2_tokenizer
from tests.original_glm import tiny_tokenizer

FOLDER = GOLDEN / "tokenizer"
DUMMY_PREFIX_OFFSET = 1_018_365  # the one byte in which CodeGeeX2's tokenizer.model differs


def golden(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return content


def codegeex2_tokenizer(folder: Path) -> SentencePieceTokenizer:
    content = bytearray(CHATGLM2_TOKENIZER.read_bytes())
    content[DUMMY_PREFIX_OFFSET] ^= 1
    (folder / "tokenizer.model").write_bytes(content)
    return SentencePieceTokenizer(folder / "tokenizer.model")


@pytest.fixture
def tiny(tmp_path: Path) -> SentencePieceTokenizer:
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer())
    return SentencePieceTokenizer(tmp_path / "tokenizer.model")


def random_text(generator: random.Random) -> str:
    """Chinese, English, code, emoji, right-to-left, odd spaces, control characters, literal special tokens."""
    pools = [
        "的一是不了人我在有他这为之大来以个中上们你好世界，。！？",
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,;:!?",
        " \t\n\r\u3000\u00a0\u2581\u200b\u200d\x00\x01\x7f",
        "👋😀👩‍👩‍👧‍👦🇨🇳é́ñüßøœāžשלוםمرحبا",
        "{}[]()<>=+-*/\\|&^%$#@!~`'\"_",
    ]
    words = [
        "[gMASK]",
        "sop",
        "eop",
        "</s>",
        "<s>",
        "<unk>",
        "<0x0A>",
        "<|user|>",
        "def f(x):\n    ",
        "[Round 1]\n\n问：",
        "答：",
    ]
    parts: list[str] = []
    for _ in range(generator.randint(1, 12)):
        kind = generator.randrange(len(pools) + 2)
        if kind < len(pools):
            parts.append("".join(generator.choices(pools[kind], k=generator.randint(1, 8))))
        elif kind == len(pools):
            parts.append(generator.choice(words))
        else:
            parts.append(
                chr(generator.choice([generator.randrange(0x20, 0xD800), generator.randrange(0xE000, 0x110000)]))
            )
    return "".join(parts)


@needs_chatglm2_tokenizer
def test_golden_strings_have_the_ids_and_the_text_of_the_original() -> None:
    content, tokenizer = golden("chatglm2.json"), SentencePieceTokenizer(CHATGLM2_TOKENIZER)
    assert [tokenizer.gmask, tokenizer.sop] == content["prefix_ids"]
    assert tokenizer.num_tokens == content["special_ids"]["eop"] + 1
    for case in content["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    for case in content["decode"]:
        assert tokenizer.decode(case["ids"]) == case["text"], case
    prefixes = content["decode_prefixes"]
    for case in prefixes["prefixes"]:
        assert tokenizer.decode(prefixes["ids"][: case["n"]]) == case["text"]


def test_the_tiny_model_of_the_golden_data_agrees() -> None:
    tokenizer = SentencePieceTokenizer(FOLDER / "tiny_spm.model")
    for case in golden("tiny_spm.json")["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


@needs_chatglm2_tokenizer
def test_codegeex2_takes_the_missing_space_from_its_own_model_file(tmp_path: Path) -> None:
    content, tokenizer = golden("codegeex2.json"), codegeex2_tokenizer(tmp_path)
    for case in content["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    chat_format = ChatGLM2Format(tokenizer)
    assert chat_format.encode("你好") == [*content["prefix_ids"], 39701]


@needs_chatglm2_tokenizer
def test_20_000_generated_strings_are_encoded_and_decoded_as_by_sentencepiece_itself() -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(CHATGLM2_TOKENIZER))
    tokenizer = SentencePieceTokenizer(CHATGLM2_TOKENIZER)
    generator = random.Random(20_000)
    for _ in range(20_000):
        text = random_text(generator)
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert max(ids, default=0) < tokenizer.num_pieces  # nothing that a user writes is a special token
        shown = [i for i in ids if i > 2]
        assert tokenizer.decode(ids) == reference.decode(shown)


@needs_chatglm2_tokenizer
def test_random_runs_of_ids_are_decoded_as_by_sentencepiece_itself() -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(CHATGLM2_TOKENIZER))
    tokenizer = SentencePieceTokenizer(CHATGLM2_TOKENIZER)
    generator = random.Random(4_000)
    for _ in range(2_000):
        ids = [generator.randrange(3, generator.choice([300, 64_789])) for _ in range(generator.randint(0, 20))]
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_specials_and_ids_without_text_are_dropped(tiny: SentencePieceTokenizer) -> None:
    ids = tiny.encode("hello 👋 world")
    without_text = [0, 1, 2, *range(tiny.num_pieces, tiny.num_pieces + 50), 10**9]
    assert tiny.decode([*without_text, *ids, *without_text]) == "hello 👋 world"
    assert tiny.decode(without_text) == tiny.decode([]) == ""


def test_a_special_token_inside_a_character_breaks_it(tiny: SentencePieceTokenizer) -> None:
    wave = tiny.encode("👋")[-4:]
    assert tiny.decode(wave) == "👋"
    assert tiny.decode([wave[0], tiny.sop, *wave[1:]]) == "�" * 4


def test_the_bytes_of_the_tokens_are_the_text(tiny: SentencePieceTokenizer) -> None:
    text = "hello 你好\n👋 ▁ 12"
    assert b"".join(tiny.token_bytes(i) for i in tiny.encode(text)) == b" " + text.replace("▁", " ").encode()
    assert {tiny.token_bytes(i) for i in (0, 1, 2, tiny.gmask, tiny.sop, 10**9)} == {b""}


def test_literal_special_tokens_in_a_text_stay_text(tiny: SentencePieceTokenizer) -> None:
    for text in ("[gMASK]", "sop", "eop", "</s>", "<s>", "<unk>", "<0x0A>", "<|user|>", "people sophomore"):
        ids = tiny.encode(text)
        assert min(ids) > 2
        assert max(ids) < tiny.num_pieces
        assert tiny.decode(ids) == text


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "ok \ud83d\n"])
def test_a_lone_surrogate_is_the_clients_fault(text: str, tiny: SentencePieceTokenizer) -> None:
    with pytest.raises(PromptError) as refusal:
        ChatGLM2Format(tiny).encode(text)
    assert refusal.value.param == "prompt"
    assert "surrogate" in refusal.value.message


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    with pytest.raises(ImportRefused, match=r"no tokenizer\.model"):
        open_for_import(file, NUM_SPECIALS, 448)
    file.write_bytes(b"nonsense")
    with pytest.raises(ImportRefused, match="not a SentencePiece model"):
        open_for_import(file, NUM_SPECIALS, 448)
    file.write_bytes(tiny_tokenizer())
    size = SentencePieceTokenizer(file).num_pieces
    open_for_import(file, NUM_SPECIALS, size + NUM_SPECIALS)
    for specials, padded in ((NUM_SPECIALS, 65_024), (NUM_SPECIALS + NUM_ROLES, size + NUM_SPECIALS)):
        with pytest.raises(ImportRefused, match="belongs to another model"):
            open_for_import(file, specials, padded)
