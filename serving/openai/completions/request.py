"""The body of a request for raw completions -> one generation job for each prompt."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from serving.generation.pipeline import CompletionJob
from serving.http.errors import invalid
from serving.openai.common import ChoicesRequest, TokenId

DEFAULT_MAX_TOKENS = 16  # OpenAI's default of this endpoint


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<string>"
    if not isinstance(value, list):
        return None
    items: list[Any] = value
    if items and isinstance(items[0], list):
        return "<id lists>"
    if items and isinstance(items[0], int) and not isinstance(items[0], bool):
        return "<ids>"
    return "<texts>"


Prompts = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("<texts>")]
    | Annotated[list[TokenId], Field(min_length=1, fail_fast=True), Tag("<ids>")]
    | Annotated[
        list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]], Field(fail_fast=True), Tag("<id lists>")
    ],
    Discriminator(_prompt_kind, custom_error_type="string_or_array", custom_error_message="string or array"),
]


def to_prompts(value: str | list[str] | list[int] | list[list[int]]) -> list[str | tuple[int, ...]]:
    """The prompts or inputs of one request, each a text or token ids."""
    if isinstance(value, str):
        return [value]
    ids = tuple(item for item in value if isinstance(item, int))
    if ids:
        return [ids]
    return [item if isinstance(item, str) else tuple(item) for item in value if not isinstance(item, int)]


class CompletionRequest(ChoicesRequest):
    """POST /completions."""

    prompt: Prompts

    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            message = "The prompt's log-probabilities are not available: 'echo' excludes 'logprobs'."
            raise invalid(message, "logprobs")
        if self.best_of is not None and self.best_of < self.n:
            raise invalid("'best_of' must be at least 'n'.", "best_of")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            message = "'best_of' greater than 'n' cannot be streamed: the best is known at the end."
            raise invalid(message, "best_of")
        return self


def to_completion_jobs(body: CompletionRequest, max_answers: int) -> list[CompletionJob]:
    """One job for each prompt. Raises APIError 400 when all prompts together ask for more than `max_answers`."""
    prompts = to_prompts(body.prompt)
    best_of = body.best_of or body.n
    if len(prompts) * best_of > max_answers:
        raise invalid(
            f"You requested {len(prompts) * best_of} completions in total (prompts times the larger of 'n' and "
            f"'best_of'); at most {max_answers} are allowed in one request.",
            "prompt" if best_of == 1 else "n",
        )
    # the candidates of `best_of` are ranked by the log-probabilities of their tokens
    num_top_logprobs = 0 if body.logprobs is None and best_of > body.n else body.logprobs
    length = body.requested_length
    return [
        CompletionJob(
            prompt=prompt,
            param="prompt" if len(prompts) == 1 else f"prompt[{i}]",
            sampling=body.sampling(length or DEFAULT_MAX_TOKENS, num_top_logprobs),
            stop=body.stop_strings,
            n=body.n,
            best_of=best_of,
            max_tokens_is_default=length is None,
            echo=body.echo,
            ignore_eos=body.ignore_eos,
        )
        for i, prompt in enumerate(prompts)
    ]
