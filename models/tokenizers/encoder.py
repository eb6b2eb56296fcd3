"""tokenizer.json -> ids of one text or of a pair of texts, with the special tokens that an encoder was trained with."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Encoding, Tokenizer

from serving.engine.interface import EncoderInput


class EncoderTokenizer:
    """See serving.generation.encoder.EncoderTokenizer."""

    def __init__(self, file: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        found = [i for name in ("[UNK]", "<unk>") if (i := self._tokenizer.token_to_id(name)) is not None]
        self._unknown = found[0] if found else 0
        self._special = special - {self._unknown} if found else set()
        marks = self._tokenizer.encode("a").special_tokens_mask
        self._num_last = marks[::-1].index(0)  # special tokens at the end of every input

    def encode(self, text: str) -> EncoderInput:
        return self._input(self._tokenizer.encode(text))

    def encode_pair(self, first: str, second: str, max_second: int | None = None) -> EncoderInput:
        found = self._tokenizer.encode(first, second)
        pair = self._input(found)
        if max_second is None:
            return pair
        num_second = sum(1 for part in found.sequence_ids if part == 1)
        return self.truncated(pair, len(pair.token_ids) - max(0, num_second - max_second))

    def _input(self, found: Encoding) -> EncoderInput:
        """A vocabulary may have the special tokens as words, too: in a text such a word is unknown."""
        pairs = zip(found.ids, found.special_tokens_mask, strict=True)
        ids = (self._unknown if not is_special and i in self._special else i for i, is_special in pairs)
        return EncoderInput(tuple(ids), tuple(found.type_ids))

    def truncated(self, given: EncoderInput, max_tokens: int) -> EncoderInput:
        """The special tokens at the end stay: there are as many as behind an empty text."""
        size = len(given.token_ids)
        num_kept = max(0, max_tokens - self._num_last)
        kept = [*range(num_kept), *range(max(num_kept, size - self._num_last), size)]
        ids, types = given.token_ids, given.type_ids
        return EncoderInput(tuple(ids[i] for i in kept), tuple(types[i] for i in kept) if types else ())
