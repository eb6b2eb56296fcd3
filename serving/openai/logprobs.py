"""Log-probabilities of an answer's tokens -> entries of `logprobs.content`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from serving.generation.interface import TextToken
from serving.openai.common import TokenBytes

LOWEST_LOGPROB = -9999.0  # what OpenAI writes where the true value has no JSON: minus infinity

Logprob = Annotated[float, Field(le=0)]


class TopLogprob(TypedDict):
    """A token that could have stood here."""

    token: str
    logprob: Logprob
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class TokenLogprobEntry(TopLogprob):
    """The token that stands here, and the likeliest ones."""

    top_logprobs: Annotated[list[TopLogprob], Field(max_length=20)]


def to_entries(tokens: Sequence[TextToken], token_bytes: TokenBytes) -> list[TokenLogprobEntry]:
    entries: list[TokenLogprobEntry] = []
    for token in tokens:
        top = [_top(raw, logprob) for raw, logprob in alternatives(token, token_bytes)]
        entries.append({**_top(token.share, token.logprob.logprob), "top_logprobs": top})
    return entries


def alternatives(token: TextToken, token_bytes: TokenBytes) -> list[tuple[bytes, float]]:
    """(bytes, logprob) of the likeliest tokens in the place of this one, as they would stand in the text."""
    found: list[tuple[bytes, float]] = []
    for token_id, logprob in token.logprob.top:
        raw = token.share if token_id == token.logprob.token_id else token_bytes(token_id)
        found.append((raw.removeprefix(b" ") if token.is_trimmed else raw, logprob))
    return found


def to_text(raw: bytes, prefix: str = "") -> str:
    """A token's text, or, if it is a part of a character, its bytes in OpenAI's notation, after the prefix."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in raw)


def _top(raw: bytes, logprob: float) -> TopLogprob:
    return {"token": to_text(raw), "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(raw)}
