"""Tokens of an answer and the text that was made of them -> the share of the text that each token has, in UTF-8."""

from __future__ import annotations

from collections.abc import Callable

from serving.engine.outputs import TokenLogprob
from serving.generation.interface import TextToken


class TokenShares:
    """Splits the text of one answer among its tokens: the shares of all tokens, joined, are the text.

    A token's share is its own bytes, unless text was changed on the way: a trimmed space or a stop string is in no
    share, a replacement (U+FFFD for a broken character, a filled-in placeholder) is split among the tokens that it
    stands for. Text is returned with whole tokens only, so it may wait for one token more than without shares.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._tokens: list[tuple[bytes, bool, TokenLogprob]] = []  # (bytes, has lost leading white space, ...)
        self._text = b""  # of these tokens, as far as it is known
        self._has_begun = False  # leading white space was compared
        self._is_changed = False  # the text is not what the tokens' bytes are

    def push_token(self, logprob: TokenLogprob) -> None:
        """The next token, before the text that it completes."""
        self._tokens.append((self._token_bytes(logprob.token_id), False, logprob))

    def push_text(self, text: str) -> None:
        """More text of the answer."""
        self._text += text.encode()

    def take(self) -> tuple[str, tuple[TextToken, ...]]:
        """The text whose tokens are known, with these tokens; '' if there is none."""
        ends = self._exact_ends()
        count = len(ends)
        is_other = count < len(self._tokens) and not self._is_begun(count, ends[-1] if ends else 0)
        if is_other and self._tokens[-1][0] and self._text.endswith(self._tokens[-1][0]):
            # text was changed, up to the last token. A last token is kept from here on: it is sure to be there for
            # text that should have been attributed to an earlier one
            self._is_changed, ends = True, self._all_ends(ends)
        if self._is_changed:
            ends = ends[: len(self._tokens) - 1]
        while ends and (not ends[-1] or _is_inside_character(self._text, ends[-1])):
            ends.pop()
        return self._pop(ends)

    def flush(self, with_all_tokens: bool = True) -> tuple[str, tuple[TextToken, ...]]:
        """All the rest. with_all_tokens: with tokens that have no share of it; else these are dropped."""
        text, tokens = self._pop(self._all_ends(self._exact_ends()))
        return text, tokens if with_all_tokens else tuple(token for token in tokens if token.share)

    def _exact_ends(self) -> list[int]:
        """Where the share of each token ends, for the first ones, whose bytes are those of the text."""
        if self._text and not self._has_begun:
            self._has_begun = True
            self._drop_leading_space()
        ends: list[int] = []
        end = 0
        for raw, _, _ in self._tokens:
            if not self._text.startswith(raw, end) or end == len(self._text):
                break
            end += len(raw)
            ends.append(end)
        return ends

    def _drop_leading_space(self) -> None:
        given = _leading_space(b"".join(raw for raw, _, _ in self._tokens))
        num_dropped = max(0, len(given) - len(_leading_space(self._text)))
        for index, (raw, _, logprob) in enumerate(self._tokens):
            if not num_dropped:
                break
            lost = min(num_dropped, len(raw))
            num_dropped -= lost
            self._tokens[index] = raw[lost:], lost > 0, logprob

    def _is_begun(self, index: int, start: int) -> bool:
        """Whether the text behind `start` is the beginning of this token, or nothing yet."""
        return self._tokens[index][0].startswith(self._text[start:])

    def _all_ends(self, exact: list[int]) -> list[int]:
        """Where the shares of all tokens end, if all the text is theirs. exact: the ends that are known.

        What the two have in common at the beginning and at the end is attributed as it is; what is different between
        them, in proportion.
        """
        text = self._text
        while exact and _is_inside_character(text, exact[-1]):
            exact.pop()  # U+FFFD begins with the byte of a broken character
        start, rest = exact[-1] if exact else 0, [raw for raw, _, _ in self._tokens[len(exact) :]]
        raw = b"".join(rest)
        prefix = _num_common(raw, text[start:])
        while prefix and _is_inside_character(text, start + prefix):
            prefix -= 1
        suffix = _num_common(raw[prefix:][::-1], text[start + prefix :][::-1])
        while suffix and _is_inside_character(text, len(text) - suffix):
            suffix -= 1
        num_raw, num_text = len(raw) - prefix - suffix, len(text) - start - prefix - suffix
        ends = list(exact)
        position = 0
        for part in rest:
            position += len(part)
            if position <= prefix:
                end = start + position
            elif position >= prefix + num_raw:
                end = len(text) - (len(raw) - position)
            else:
                end = start + prefix + -(-(position - prefix) * num_text // num_raw)
                while _is_inside_character(text, end):
                    end += 1
            ends.append(end)
        if ends:
            ends[-1] = len(text)
        return ends

    def _pop(self, ends: list[int]) -> tuple[str, tuple[TextToken, ...]]:
        """The first tokens, whose shares end there, and the text up to the last of them."""
        starts = [0, *ends]
        tokens = tuple(
            TextToken(logprob, self._text[start:end], is_trimmed)
            for (_, is_trimmed, logprob), start, end in zip(self._tokens, starts, ends, strict=False)
        )
        text, self._text = self._text[: starts[-1]].decode(), self._text[starts[-1] :]
        del self._tokens[: len(ends)]
        return text, tokens


def _leading_space(raw: bytes) -> bytes:
    text = raw.decode("utf-8", "replace")
    return text[: len(text) - len(text.lstrip())].encode()


def _num_common(one: bytes, other: bytes) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


def _is_inside_character(text: bytes, position: int) -> bool:
    """Whether a cut here would split a character of UTF-8."""
    return position < len(text) and text[position] & 0xC0 == 0x80
