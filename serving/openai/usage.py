"""Token counts of answers -> OpenAI's `usage` object, at the end or while a stream runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from typing_extensions import TypedDict

from serving.generation.interface import ChatEvent, Finished, ReasoningDelta, TextDelta, ToolCallDelta, Usage
from serving.openai.common import Count


class PromptTokensDetails(TypedDict):
    """`cached_tokens`: how many of the prompt did not have to be computed again."""

    cached_tokens: Count
    audio_tokens: Literal[0]


class CompletionTokensDetails(TypedDict):
    """`reasoning_tokens`: of a model that thinks before it answers; the others are 0, as there are no such tokens."""

    reasoning_tokens: Count
    audio_tokens: Literal[0]
    accepted_prediction_tokens: Literal[0]
    rejected_prediction_tokens: Literal[0]


class CompletionUsage(TypedDict):
    """Token counts of one request; the end token counts as generated."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


def to_completion_usage(usage: Usage) -> CompletionUsage:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def total_usage(prompts: Iterable[Iterable[Usage]]) -> Usage:
    """The counts of one request: those of each prompt's finished choices together, where the prompt counts once."""
    num_prompt = num_completion = num_cached = num_reasoning = 0
    for choices in map(list, prompts):
        if choices:
            num_prompt += choices[0].prompt_tokens
            num_completion += sum(usage.completion_tokens for usage in choices)
            num_reasoning += sum(usage.reasoning_tokens for usage in choices)
            # later choices find the prompt that the first one computed; what was there before is the least of them
            num_cached += min(usage.cached_tokens for usage in choices)
    return Usage(num_prompt, num_completion, num_cached, num_reasoning)


class RunningUsage:
    """Token counts of a stream so far: exact for finished choices, by the tokens of their text for the others."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens  # of all prompts together
        self._num_tokens: dict[int, int] = {}  # by choice
        self._finished: dict[int, list[Usage]] = {}  # by prompt

    def push(self, index: int, event: ChatEvent, prompt: int = 0) -> None:
        """Count an event of choice `index`, which answers this prompt."""
        match event:
            case TextDelta(num_tokens=num_tokens) | ReasoningDelta(num_tokens=num_tokens):
                self._num_tokens[index] = self._num_tokens.get(index, 0) + num_tokens
            case Finished(_, usage):
                self._num_tokens[index] = usage.completion_tokens
                self._finished.setdefault(prompt, []).append(usage)
            case ToolCallDelta():
                pass

    @property
    def so_far(self) -> CompletionUsage:
        num_cached = total_usage(self._finished.values()).cached_tokens
        return to_completion_usage(Usage(self._num_prompt_tokens, sum(self._num_tokens.values()), num_cached))

    @property
    def final(self) -> CompletionUsage:
        return to_completion_usage(total_usage(self._finished.values()))
