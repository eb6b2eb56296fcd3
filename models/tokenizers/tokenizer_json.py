"""The pieces of a prompt -> ids, and ids -> text, by a Hugging Face `tokenizer.json`.

A prompt is a sequence of pieces: text, in which no control token is ever recognised, and control tokens. The whole
prompt still goes through the tokenizer as one string, so that text at the beginning of a prompt, behind a control token
or across the words of template and client is tokenized as usual: control tokens are replaced by anchors, added tokens
whose names are random so that no client can type them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from models.family import ImportRefused
from models.tokenizers.length import LengthBound
from serving.generation.interface import PromptError

SPACE = "▁"  # a space in the vocabulary of a SentencePiece-like tokenizer
AnchorKind = tuple[bool, bool, bool]  # lstrip, rstrip, normalized: what a token does to the text around it


@dataclass(frozen=True)
class PromptPiece:
    """A run of a prompt: plain text, or exactly one control token."""

    text: str
    is_control: bool


class FastTokenizer:
    """Pieces -> ids, ids -> text. Immutable, so safe to use from several threads."""

    def __init__(self, file: Path, named: Iterable[str] = ()) -> None:
        """named: texts of the tokens that the folder's configuration names as control tokens.

        Raises ImportRefused for a file that is not a tokenizer, or one whose vocabulary is of an unknown kind.
        """
        named = set(named)
        try:
            description: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            plain = Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception
            raise ImportRefused(f"{file} is not a readable tokenizer ({error})") from None
        added: list[dict[str, Any]] = description.setdefault("added_tokens", [])
        added += _unlisted(plain, named - {token["content"] for token in added})
        self._special = {token["id"] for token in added if token["special"]}
        self._control = _control_tokens(added, named)
        self._bytes = _token_bytes(plain, description, {token["id"] for token in added}, self._special)
        self._drops_first_space = _drops_first_space(description)
        self.num_tokens = max(self._bytes, default=-1) + 1
        self._encoder, self._anchors = _encoder(description, self._control)
        self._prefix = self._read_prefix()
        self._bound = LengthBound(self._bytes.values(), lambda text: self._encoder.encode(text).ids)

    @property
    def control_names(self) -> frozenset[str]:
        """Every text that a template may write for a control token."""
        return frozenset(self._control)

    def id_of(self, name: str) -> int | None:
        """The id of a control token, or None."""
        token = self._control.get(name)
        return None if token is None else int(token["id"])

    def name_of(self, token_id: int) -> str | None:
        """The name of a control token, or None."""
        return next((name for name, token in self._control.items() if token["id"] == token_id), None)

    def encode(
        self, pieces: Sequence[PromptPiece], param: str = "messages", context_length: int | None = None
    ) -> list[int]:
        """The ids of a prompt. Raises PromptError, naming `param`, for text that cannot be written as text, and
        PromptTooLong as `ChatFormat.render`."""
        self._bound.check((piece.text for piece in pieces if not piece.is_control), context_length, param)
        parts: list[str] = []
        expected: list[tuple[int, int]] = []
        for piece in pieces:
            if piece.is_control:
                token = self._control[piece.text]
                anchor, anchor_id = self._anchors[_kind(token)]
                parts.append(anchor)
                expected.append((anchor_id, int(token["id"])))
            else:
                parts.append(piece.text)
        text = "".join(parts)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise PromptError("The text holds a lone surrogate, which is not a character.", param) from None
        return self._without_anchors(self._encoder.encode(text, add_special_tokens=False).ids, expected, param)

    def encode_plain(self, text: str, context_length: int | None = None) -> list[int]:
        """The ids of a raw text (`/v1/completions`), after the tokenizer's own prefix (usually BOS)."""
        return self._prefix + self.encode([PromptPiece(text, False)], "prompt", context_length)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a run: '' for special tokens, U+FFFD for incomplete characters.

        The library's own decoder of byte tokens changes line breaks in front of an incomplete character.
        """
        text = b"".join(self._bytes.get(token_id, b"") for token_id in token_ids)
        if self._drops_first_space:
            text = text.removeprefix(b" ")
        return text.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token inside a text; b'' for special tokens."""
        return self._bytes.get(token_id, b"")

    def _without_anchors(self, ids: list[int], expected: list[tuple[int, int]], param: str) -> list[int]:
        anchor_ids = {anchor_id for _, anchor_id in self._anchors.values()}
        control_ids = {int(token["id"]) for token in self._control.values()}
        anchors = iter(expected)
        out: list[int] = []
        for token_id in ids:
            if token_id in control_ids:
                # a vocabulary may hold the name of a control token as an ordinary piece
                raise PromptError("The text holds a control token that this model cannot read as text.", param)
            anchor_id, control_id = next(anchors, (-1, -1)) if token_id in anchor_ids else (token_id, token_id)
            if anchor_id != token_id:
                raise PromptError("The text cannot be told apart from control tokens.", param)
            out.append(control_id)
        if next(anchors, None) is not None:
            raise PromptError("The text cannot be told apart from control tokens.", param)
        return out

    def _read_prefix(self) -> list[int]:
        encoded = self._encoder.encode("a", add_special_tokens=True)
        first_text = encoded.special_tokens_mask.index(0)
        return list(encoded.ids[:first_text])


def _unlisted(tokenizer: Tokenizer, names: set[str]) -> list[dict[str, Any]]:
    """Tokens that the configuration names and the vocabulary has, but the file does not list as added."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = {name: tokenizer.token_to_id(name) for name in sorted(names)}
    return [{"id": token_id, "content": name, **flags} for name, token_id in ids.items() if token_id is not None]


def _control_tokens(added: Iterable[dict[str, Any]], named: set[str]) -> dict[str, dict[str, Any]]:
    """By name: tokens marked special, tokens that the configuration names, and those that look like markup.

    Markup such as <think> or <tool_call> is often not marked special, so that answers show it; in a prompt only the
    template may write it. Added tokens that are words or runs of spaces are ordinary text. A name of one character
    cannot be told from that character; it is left to the tokenizer, which does not recognise it in text either.
    """
    return {
        token["content"]: token
        for token in added
        if len(token["content"]) > 1 and (token["special"] or token["content"] in named or _is_markup(token["content"]))
    }


def _is_markup(content: str) -> bool:
    return content.startswith(("<", "[")) and content.endswith((">", "]"))


def _kind(token: Mapping[str, Any]) -> AnchorKind:
    return (bool(token["lstrip"]), bool(token["rstrip"]), bool(token["normalized"]))


def _encoder(
    description: Mapping[str, Any], control: Mapping[str, Mapping[str, Any]]
) -> tuple[Tokenizer, dict[AnchorKind, tuple[str, int]]]:
    """A copy that recognises anchors in text but no control token; and the anchors, each with its id."""
    names = set(control)
    listed: list[dict[str, Any]] = description["added_tokens"]
    added = [token | {"special": token["special"] or token["content"] in names} for token in listed]
    encoder = Tokenizer.from_str(json.dumps({**description, "added_tokens": added}))
    encoder.encode_special_tokens = True
    encoder.no_padding()
    encoder.no_truncation()
    anchors: dict[AnchorKind, tuple[str, int]] = {}
    for kind in sorted({_kind(token) for token in control.values()}):
        lstrip, rstrip, normalized = kind
        name = f"\ue000{secrets.randbits(96):029d}\ue001"
        encoder.add_tokens([AddedToken(name, lstrip=lstrip, rstrip=rstrip, normalized=normalized, special=False)])
        anchors[kind] = (name, int(encoder.token_to_id(name) or 0))
    return encoder, anchors


def _parts(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A part of a tokenizer.json, or the members of a nested sequence of parts."""
    if part is None:
        return []
    return [inner for member in part[key] for inner in _parts(member, key)] if key in part else [part]


def _drops_first_space(description: Mapping[str, Any]) -> bool:
    for part in _parts(description.get("decoder"), "decoders"):
        if part["type"] == "Strip" and part.get("content") == " " and part.get("start", 0) > 0:
            return True
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return True
    return False


def _token_bytes(
    tokenizer: Tokenizer, description: Mapping[str, Any], added: set[int], special: set[int]
) -> dict[int, bytes]:
    """The bytes of every token. Raises ImportRefused for a vocabulary that is of neither of the two known kinds."""
    kinds = {part["type"] for part in _parts(description.get("decoder"), "decoders")}
    is_byte_level = "ByteLevel" in kinds
    if not is_byte_level and not kinds & {"Metaspace", "Replace"}:
        raise ImportRefused(f"the tokenizer has an unknown kind of decoder ({', '.join(sorted(kinds)) or 'none'})")
    byte_of = _byte_alphabet()
    token_bytes: dict[int, bytes] = {}
    for name, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id in special:
            token_bytes[token_id] = b""
        elif token_id in added:
            token_bytes[token_id] = name.encode()
        elif is_byte_level:
            token_bytes[token_id] = bytes(byte_of[character] for character in name if character in byte_of)
        elif "ByteFallback" in kinds and len(name) == 6 and name.startswith("<0x"):
            token_bytes[token_id] = bytes([int(name[3:5], 16)])
        else:
            token_bytes[token_id] = name.replace(SPACE, " ").encode()
    return token_bytes


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies: printable ones themselves, others from U+0100.

    Source: GPT-2, encoder.py, bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
