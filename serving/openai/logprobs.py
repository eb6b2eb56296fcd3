"""Log-probabilities of an answer's tokens -> entries of `logprobs.content`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from serving.engine.interface import TokenLogprob
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


def to_entries(logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes) -> list[TokenLogprobEntry]:
    entries: list[TokenLogprobEntry] = []
    for entry in logprobs:
        top = [_top(token_id, logprob, token_bytes) for token_id, logprob in entry.top]
        entries.append({**_top(entry.token_id, entry.logprob, token_bytes), "top_logprobs": top})
    return entries


def _top(token_id: int, logprob: float, token_bytes: TokenBytes) -> TopLogprob:
    raw = token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(raw)}
