"""Text -> ids, and ids -> text, by the SentencePiece model of ChatGLM-6B, the first version."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from models.tokenizers.length import LengthBound
from serving.generation.interface import PromptError

NEWLINE, TAB = "<n>", "<|tab|>"
MAX_BLANKS = 80
_WHITE_SPACE = re.compile(r"\n|\t| {2,80}")
# Characters that the model's normaliser turns into "<", the beginning of every white-space token's name.
_AFTER_OPENING = re.compile(r"(?<=[<\uFE64\uFF1C])")


class ChatGLMTokenizer:
    """Text -> ids and back. Line breaks, tabs and runs of spaces have tokens of their own.

    The original also turns the names of control tokens inside a text into those tokens: "<eop>" typed by a user ends
    the turn, "<n>" becomes a line break. Here, deliberately, a name is ordinary text. Everything else is equal.
    num_image_tokens: ids below this have no text (20,000 in the earliest checkpoints, 0 later).
    """

    def __init__(self, model_file: Path, num_image_tokens: int) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        self._offset = num_image_tokens
        self._white_space = self._white_space_pieces()
        self._newline = self._pieces.piece_to_id(NEWLINE)
        self.num_tokens = self._offset + self._pieces.get_piece_size()
        self.bound = LengthBound(map(self.token_bytes, range(self._offset, self.num_tokens)), self.encode)

    def special_id(self, name: str) -> int | None:
        """The id of a token by its name ("[gMASK]", "<sop>"), or None."""
        piece = self._pieces.piece_to_id(name)
        return None if piece == self._pieces.unk_id() else self._offset + piece

    def encode(self, text: str, param: str = "messages") -> list[int]:
        """The ids of a text, never those of control tokens. Raises PromptError for a lone surrogate."""
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise PromptError("The text holds a lone surrogate, which is not a character.", param)
        pieces = self._pieces.encode(_name_white_space(text))
        if self._count_white_space(pieces) != len(_WHITE_SPACE.findall(text)):
            pieces = self._encode_split(text)
        return [self._offset + piece for piece in pieces]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a run of ids: '' for control tokens and image tokens, U+FFFD for incomplete characters."""
        parts: list[str] = []
        run: list[int] = []
        for piece in (token_id - self._offset for token_id in token_ids):
            if piece in self._white_space:
                parts += (self._decode_run(run, is_first=not parts), self._white_space[piece])
                run = []
            elif self._has_text(piece):
                run.append(piece)
        parts.append(self._decode_run(run, is_first=not parts))
        return "".join(parts)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token inside a text; b'' for control tokens and image tokens."""
        piece = token_id - self._offset
        if piece in self._white_space:
            return self._white_space[piece].encode()
        if not self._has_text(piece):
            return b""
        name = self._pieces.id_to_piece(piece)
        if self._pieces.is_byte(piece):
            return bytes([int(name[3:5], 16)])
        return name.replace("▁", " ").encode()

    def _white_space_pieces(self) -> dict[int, str]:
        names = {NEWLINE: "\n", TAB: "\t"} | {_blank(length): " " * length for length in range(2, MAX_BLANKS + 1)}
        return {self._pieces.piece_to_id(name): text for name, text in names.items() if self.special_id(name)}

    def _has_text(self, piece: int) -> bool:
        in_vocabulary = 0 <= piece < self._pieces.get_piece_size()
        return in_vocabulary and not self._pieces.is_control(piece) and not self._pieces.is_unknown(piece)

    def _count_white_space(self, pieces: Sequence[int]) -> int:
        return sum(piece in self._white_space for piece in pieces)

    def _encode_split(self, text: str) -> list[int]:
        """Encode a text that contains the name of a white-space token: split after every "<", which interrupts names.

        A later part is encoded after a line break, whose token is then dropped: that keeps SentencePiece from adding
        the space that it puts in front of a text.
        """
        first, *rest = _AFTER_OPENING.split(text)
        pieces: list[int] = self._pieces.encode(_name_white_space(first))
        for part in rest:
            with_newline = self._pieces.encode(NEWLINE + _name_white_space(part))
            pieces += with_newline[with_newline.index(self._newline) + 1 :]
        return pieces

    def _decode_run(self, run: list[int], is_first: bool) -> str:
        """Decode the pieces between white-space tokens; only the first run of a text loses its leading space."""
        if is_first:
            return str(self._pieces.decode(run))
        return str(self._pieces.decode([self._newline, *run])).removeprefix(NEWLINE)


def _blank(length: int) -> str:
    return f"<|blank_{length}|>"


def _name_white_space(text: str) -> str:
    """Replace line breaks, tabs and runs of 2 to 80 spaces by the names of their tokens."""
    names = {"\n": NEWLINE, "\t": TAB}
    return _WHITE_SPACE.sub(lambda match: names.get(match[0]) or _blank(len(match[0])), text)
