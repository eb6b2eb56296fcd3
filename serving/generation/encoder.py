"""Texts and pairs of texts -> checked inputs of an encoder -> vectors of length 1, or scores between 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from serving.engine.encoder_engine import EncoderEngine
from serving.engine.interface import EncoderInput
from serving.engine.output_queue import OutputQueue
from serving.engine.outputs import PoolingOutput
from serving.generation.interface import EncoderTokenizer, PromptError
from serving.generation.pipeline import ContextOverflow, ModelUse

MAX_INPUTS_AT_ONCE = 64  # of one request in the engine: a list of thousands must not delay other requests
PROMPT_NAMES = {
    "query": ("query", "search_query", "s2p_query"),
    "document": ("document", "passage", "search_document", "corpus"),
}


@dataclass(frozen=True)
class RunningEncoder:
    """A loaded encoder and the engine that runs it."""

    engine: EncoderEngine
    tokenizer: EncoderTokenizer
    context_length: int  # tokens of one input
    prompts: Mapping[str, str] = field(default_factory=dict[str, str])  # by name, as sentence-transformers has them
    default_prompt: str | None = None
    dimensions: tuple[int, ...] = ()  # to which its vectors may be shortened; () for none
    name: str = "model"  # for metrics
    use: ModelUse = field(default_factory=ModelUse)

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self.engine.network.num_outputs

    def prompt_of(self, prompt_name: str | None, input_type: str | None) -> str:
        """The text in front of each input. Raises PromptError for a prompt name that the model does not have."""
        if prompt_name is not None:
            if prompt_name not in self.prompts:
                known = ", ".join(self.prompts) or "no prompts"
                raise PromptError(f"This model has no prompt {prompt_name!r}; it has: {known}.", "prompt_name")
            return self.prompts[prompt_name]
        if input_type is None:
            return self.prompts.get(self.default_prompt or "", "")
        kind = "query" if "query" in input_type else "document"
        return next((self.prompts[name] for name in PROMPT_NAMES[kind] if name in self.prompts), "")

    def tokenize(
        self, inputs: Sequence[str | tuple[int, ...]], prompt: str = "", max_tokens: int | None = None
    ) -> list[EncoderInput]:
        """The inputs of an embeddings request. max_tokens: where longer ones are cut; None refuses those that are
        longer than the context. Raises PromptError. Pure; any thread."""
        tokenized: list[EncoderInput] = []
        for index, value in enumerate(inputs):
            param = "input" if len(inputs) == 1 else f"input[{index}]"
            if not value:
                raise PromptError("The input must not be empty: it has no token to be embedded.", param)
            tokenized.append(self._checked(self._encoded(prompt, value, param), param, max_tokens))
        return tokenized

    def tokenize_pairs(
        self, pairs: Sequence[tuple[str, str, str]], max_tokens: int | None = None, max_second: int | None = None
    ) -> list[EncoderInput]:
        """Each pair with the request's field that the second text is from. Raises as `tokenize`."""
        return [
            self._checked(self.tokenizer.encode_pair(first, second, max_second), param, max_tokens)
            for first, second, param in pairs
        ]

    def _encoded(self, prompt: str, value: str | tuple[int, ...], param: str) -> EncoderInput:
        if isinstance(value, str):
            return self.tokenizer.encode(prompt + value)
        if max(value) >= self.engine.network.num_tokens:
            raise PromptError(f"This model has no token {max(value)}.", param)
        return EncoderInput(value)

    def _checked(self, given: EncoderInput, param: str, max_tokens: int | None) -> EncoderInput:
        size = len(given.token_ids)
        if max_tokens is not None:
            limit = min(max_tokens, self.context_length)
            return self.tokenizer.truncated(given, limit) if size > limit else given
        if size > self.context_length:
            raise ContextOverflow(size, 0, self.context_length, param)
        return given


async def encode(
    model: RunningEncoder,
    inputs: Sequence[EncoderInput],
    priority: int,
    finish: Callable[[Sequence[float]], list[float]],
) -> list[list[float]]:
    """One vector for each input. Cancel it to stop. Raises EngineError only.

    finish: what becomes of the network's numbers.
    """
    vectors: list[list[float]] = [[] for _ in inputs]
    for first in range(0, len(inputs), MAX_INPUTS_AT_ONCE):
        with closing(OutputQueue[PoolingOutput]()) as queue:
            model.engine.encode(inputs[first : first + MAX_INPUTS_AT_ONCE], queue, priority)
            while (outputs := await queue.take()) is not None:
                for index, output in outputs:
                    vectors[first + index] = finish(output.vector)
    return vectors


def to_score(numbers: Sequence[float]) -> list[float]:
    """A cross-encoder's logit -> how relevant the second text is, between 0 and 1."""
    return [0.5 * (1.0 + math.tanh(0.5 * numbers[0]))]  # the logistic function, without overflow
