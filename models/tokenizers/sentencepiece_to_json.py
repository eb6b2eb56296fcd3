"""A Llama-style `tokenizer.model` -> a `tokenizer.json`, for folders that have no other tokenizer.

transformers' own conversion needs a further library and drops the space that the first models of this kind (Llama,
Vicuna, WizardLM) were trained with in front of every text, also after a control token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from models.family import ImportRefused

SPACE = "▁"  # a space inside a piece
# Texts that other kinds of vocabulary and of normalisation encode differently.
PROBES = (
    "Hello world, it's 12345 o'clock.",
    " leading and  double   spaces ",
    "line\nbreak\ttab",
    "你好，世界！ 🙂 naïve ﬁ Ａ",
    "def f(x):\n    return x ** 2  # </s> <s> <unk>",
)


def convert(model_file: Path, target: Path, added: Mapping[str, int], has_bos: bool) -> None:
    """Write `target`, a tokenizer.json that gives SentencePiece's own ids.

    added: further tokens and their ids (added_tokens.json). has_bos: put the BOS token in front of a raw text.
    Raises ImportRefused if the file is not a SentencePiece model, or is of another kind (unigram, normalised text).
    """
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    except (OSError, RuntimeError):
        raise ImportRefused(f"{model_file} is not a SentencePiece model: download it again") from None
    tokenizer = _converted(pieces, has_bos)
    if any(tokenizer.encode(text, add_special_tokens=False).ids != pieces.encode(text) for text in PROBES):
        raise ImportRefused(f"{model_file} is not a Llama-style tokenizer: the folder needs a tokenizer.json")
    control = [i for i in range(pieces.get_piece_size()) if pieces.is_control(i) or pieces.is_unknown(i)]
    names = [*(str(pieces.id_to_piece(i)) for i in control), *sorted(added, key=lambda name: added[name])]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    wrong = next((name for name in added if tokenizer.token_to_id(name) != added[name]), None)
    if wrong is not None:
        raise ImportRefused(
            f"added_tokens.json gives {wrong!r} the id {added[wrong]}, which leaves a gap in the vocabulary"
        )
    tokenizer.save(str(target))


def _converted(pieces: sentencepiece.SentencePieceProcessor, has_bos: bool) -> Tokenizer:
    """The same vocabulary and merges; no special token is recognised in text."""
    names = [str(pieces.id_to_piece(i)) for i in range(pieces.get_piece_size())]
    mergeable = {
        name: i
        for i, name in enumerate(names)
        if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i) or pieces.is_unused(i))
    }
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=_merges(mergeable, [float(pieces.get_score(i)) for i in range(len(names))]),
            unk_token=names[pieces.unk_id()],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_space_in_front = SPACE in names[pieces.encode("a")[0]]
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if has_space_in_front else replace
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_space_in_front else steps)
    if has_bos and pieces.bos_id() >= 0:
        bos = names[pieces.bos_id()]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, pieces.bos_id())]
        )
    return tokenizer


def _merges(ids: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes another one, in SentencePiece's order: best score first."""
    merges: list[tuple[float, int, int, str, str]] = []
    for name, i in ids.items():
        for split in range(1, len(name)):
            left, right = name[:split], name[split:]
            if left in ids and right in ids:
                merges.append((-scores[i], ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]
