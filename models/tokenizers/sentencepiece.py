"""Text -> ids, and ids -> text, by the SentencePiece model of ChatGLM2, ChatGLM3 and CodeGeeX2.

The plain sentencepiece library: no text can become a special token, and unlike a decoder that works token by token it
keeps characters that consist of several byte pieces whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from models.family import ImportRefused
from models.tokenizers.length import LengthBound
from serving.generation.interface import PromptError

SPACE = "\u2581"  # a space inside a piece
NUM_CONTROL = 3  # <unk>, <s>, </s>
NUM_SPECIALS = 5  # [MASK], [gMASK], [sMASK], sop, eop, appended by the original's code
MAX_UNUSED = 1024  # rows of padding in an embedding; more means that the tokenizer is another model's


class SentencePieceTokenizer:
    """Text <-> ids of one `tokenizer.model`, with the special tokens whose ids follow its pieces.

    Safe to use from several threads.
    """

    def __init__(self, model_file: Path, num_specials: int = NUM_SPECIALS) -> None:
        """Raises OSError or RuntimeError if the file is missing or is not a SentencePiece model."""
        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        self.num_pieces: int = self._processor.get_piece_size()
        self.gmask = self.num_pieces + 1
        self.sop = self.num_pieces + 3
        self.eos = 2
        self.num_tokens = self.num_pieces + num_specials
        # control tokens have no text: the original drops <unk> too, where sentencepiece would print it
        self._pieces: list[str] = [
            "" if i < NUM_CONTROL else str(self._processor.id_to_piece(i)) for i in range(self.num_pieces)
        ]
        self.bound = LengthBound(map(self.token_bytes, range(self.num_pieces)), self.encode)

    def encode(self, text: str, param: str = "messages") -> list[int]:
        """The ids of a text, without any prefix. Raises PromptError, naming `param`, for a lone surrogate."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise PromptError(
                f"The text holds a lone surrogate (U+{code:04X}), which is not a character.", param
            ) from None
        return list(self._processor.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a run. Special tokens give '', an incomplete character gives U+FFFD for each byte.

        A special token between the byte pieces of a character breaks it, as in the original.
        """
        pieces = [self._pieces[i] if 0 <= i < self.num_pieces else "" for i in token_ids]
        return str(self._processor.decode_pieces(pieces)) if pieces else ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token inside a text; b'' for special tokens."""
        if not NUM_CONTROL <= token_id < self.num_pieces:
            return b""
        piece = self._pieces[token_id]
        if self._processor.is_byte(token_id):
            return bytes([int(piece[1:-1], 16)])  # <0x0A>
        return piece.replace(SPACE, " ").encode("utf-8")


def open_for_import(model_file: Path, num_specials: int, padded_vocab_size: int) -> SentencePieceTokenizer:
    """The tokenizer of a checkpoint that is being imported, checked against its embedding. Raises ImportRefused."""
    if not model_file.is_file():
        raise ImportRefused(f"{model_file.parent} has no {model_file.name}: download it into the same folder")
    try:
        tokenizer = SentencePieceTokenizer(model_file, num_specials)
    except (OSError, RuntimeError):
        raise ImportRefused(f"{model_file} is not a SentencePiece model: download it again") from None
    num_unused = padded_vocab_size - tokenizer.num_tokens
    if not 0 <= num_unused <= MAX_UNUSED:
        raise ImportRefused(
            f"{model_file} has {tokenizer.num_pieces} pieces and {num_specials} special tokens, which do not fit "
            f"padded_vocab_size={padded_vocab_size} of config.json: it belongs to another model"
        )
    return tokenizer
