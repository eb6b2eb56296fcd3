"""A text -> how many tokens it has at least, without tokenizing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from serving.generation.interface import PromptTooLong

UNKNOWN = "\ue5ca" * 64  # characters for private use, which are in no vocabulary


class LengthBound:
    """Refuses text that cannot fit into the context, whose tokenization would be work without use.

    White space is not counted: templates trim it, and tokenizers join it.
    """

    def __init__(self, token_bytes: Iterable[bytes], encode: Callable[[str], Sequence[int]]) -> None:
        """encode: the tokenizer. One that writes any run of unknown characters as one token has no bound."""
        self._longest: int | None = max(_num_characters(text.decode("utf-8", "replace")) for text in token_bytes)
        if len(encode(UNKNOWN)) < len(UNKNOWN):
            self._longest = None

    def check(self, texts: Iterable[str], context_length: int | None, param: str) -> None:
        """Raise PromptTooLong if the texts have more than `context_length` tokens, whatever the tokens are."""
        if context_length is None or self._longest is None:
            return
        texts = list(texts)
        if sum(map(len, texts)) <= context_length * self._longest:
            return
        min_tokens = -(-sum(map(_num_characters, texts)) // self._longest)
        if min_tokens > context_length:
            raise PromptTooLong(min_tokens, param)


def _num_characters(text: str) -> int:
    return sum(map(len, text.split()))
