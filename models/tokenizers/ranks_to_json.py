"""GLM-4's `tokenizer.model`, lines of a base64 token and its rank -> a `tokenizer.json` with the same ids.

Byte pair encoding by rank is that of a vocabulary's merges in the order of their results' ranks.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from models.family import ImportRefused

# the pattern of tokenization_chatglm.py of glm-4-9b-chat
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_ranks(file: Path) -> dict[bytes, int]:
    """Raises ImportRefused for another kind of file, and for ranks that are not 0, 1, 2 …"""
    ranks: dict[bytes, int] = {}
    try:
        for line in file.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise ImportRefused(f"{file} is not GLM-4's tokenizer (lines of base64 and a rank)") from None
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise ImportRefused(f"{file} is damaged: its ranks are not 0 to {len(ranks) - 1}")
    return ranks


def convert(file: Path, target: Path, specials: Mapping[str, int], prefix: tuple[str, ...]) -> None:
    """specials: control tokens and their ids, behind the ranks without a gap. prefix: those in front of every text."""
    ranks = read_ranks(file)
    text_of = _byte_texts()
    names = {token: "".join(text_of[byte] for byte in token) for token in ranks}
    merges: list[tuple[int, int, int, bytes, bytes]] = []
    for token, rank in ranks.items():
        for split in range(1, len(token)):
            left, right = token[:split], token[split:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], left, right))
    merges.sort()
    tokenizer = Tokenizer(
        models.BPE(
            vocab={names[token]: rank for token, rank in ranks.items()},
            merges=[(names[left], names[right]) for *_, left, right in merges],
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    ordered = sorted(specials, key=lambda name: specials[name])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ordered])
    wrong = next((name for name in ordered if tokenizer.token_to_id(name) != specials[name]), None)
    if wrong is not None:
        raise ImportRefused(f"{wrong!r} has the id {specials[wrong]}, which leaves a gap behind the ranks of {file}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join((*prefix, "$A")), special_tokens=[(name, specials[name]) for name in prefix]
    )
    tokenizer.save(str(target))


def _byte_texts() -> list[str]:
    """The character that byte-level vocabularies write for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(sorted(set(alphabet) - {chr(byte) for byte in printable}))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]
