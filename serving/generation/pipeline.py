"""A chat or completion job -> a checked prompt of token ids -> its answers started in the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from serving.engine.interface import Engine, SamplingParams
from serving.engine.output_queue import OutputQueue
from serving.engine.outputs import TokenOutput
from serving.generation import history
from serving.generation.detokenizer import WINDOW
from serving.generation.interface import ChatFormat, Conversation, PromptError, PromptTooLong
from serving.generation.output_processor import AnswerSpec, OutputProcessor, PlainTextParser
from serving.generation.reasoning import OPENING, ReasoningSplitter
from serving.generation.structured.answer_spec import build_answer_spec
from serving.generation.structured.grammar import USE_IF_WANTED, AnswerConstraint, ToolUse
from serving.generation.structured.token_masks import Grammars
from serving.generation.tools import prompt as tool_prompt

MARK_TOKENS = 16  # at a prompt's end, among which the opening mark of the reasoning may be


@dataclass(frozen=True)
class ChatJob:
    """A conversation and what its `n` answers must be like."""

    conversation: Conversation
    sampling: SamplingParams  # `build_prompt` adds the stop_token_ids
    stop: tuple[str, ...] = ()
    n: int = 1
    max_tokens_is_default: bool = False
    ignore_eos: bool = False
    constraint: AnswerConstraint | None = None
    tool_use: ToolUse = USE_IF_WANTED  # of the conversation's tools

    @property
    def begun(self) -> str:
        """The beginning of the answers that the client gave; '' if it gave none."""
        return self.conversation.messages[-1].content if self.conversation.continue_final else ""

    @property
    def may_reason(self) -> bool:
        """Whether an answer can begin with something else than what was asked for."""
        return not self.begun and self.constraint is None and not self.tool_use.is_required

    @property
    def needs_grammar(self) -> bool:
        """Whether `build_prompt` may have to compile a grammar, and should run in a worker thread."""
        return self.constraint is not None or bool(self.conversation.tools)


@dataclass(frozen=True)
class CompletionJob:
    """A raw prompt to be continued by `n` answers; token ids are used as they are."""

    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    param: str = "prompt"  # the request's field that holds it
    stop: tuple[str, ...] = ()
    n: int = 1
    best_of: int = 1
    max_tokens_is_default: bool = False
    ignore_eos: bool = False
    echo: bool = False


@dataclass(frozen=True)
class Prompt:
    """An accepted job: everything that can be the client's fault has been checked."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...]
    n: int
    answer: AnswerSpec
    before: tuple[int, ...] = ()  # the last of `token_ids`, if the answers continue their text
    num_dropped_rounds: int = 0


class ContextOverflow(PromptError):
    """Prompt and answer do not fit into the context.

    is_minimum: the prompt was not tokenized, and has at least `num_prompt_tokens`.
    """

    def __init__(
        self, num_prompt_tokens: int, max_tokens: int, max_positions: int, param: str, *, is_minimum: bool = False
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.max_positions = max_positions
        self.at_least = "at least " if is_minimum else ""
        super().__init__(self.sentence(param), param)

    def sentence(self, param: str) -> str:
        """param: the request's field that holds the prompt."""
        total = self.num_prompt_tokens + self.max_tokens
        return (
            f"This model's maximum context length is {self.max_positions} tokens. However, you requested "
            f"{self.at_least}{total} tokens ({self.num_prompt_tokens} in the {param}, {self.max_tokens} in the "
            f"completion). Please reduce the length of the {param} or completion."
        )


@dataclass
class ModelUse:
    """Who uses a loaded model: it is never unloaded while a request runs. For one event loop."""

    num_requests: int = 0
    last_ended: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        self.num_requests += 1

    def end(self) -> None:
        self.num_requests -= 1
        self.last_ended = time.monotonic()


@dataclass(frozen=True)
class RunningModel:
    """A loaded model and the engine that runs it."""

    engine: Engine
    chat_format: ChatFormat
    context_length: int  # tokens of prompt and answer together
    drops_oldest_rounds: bool = False  # of a conversation that does not fit, instead of refusing it
    name: str = "model"  # for metrics
    use: ModelUse = field(default_factory=ModelUse)
    grammars: Grammars = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grammars", Grammars(self.chat_format))  # the dataclass is frozen

    @property
    def num_tokens(self) -> int:
        """Ids below this have a text and a row in the network's embedding, which may have fewer than the tokenizer."""
        return min(self.chat_format.num_tokens, self.engine.shape.num_tokens)

    def build_prompt(self, job: ChatJob | CompletionJob) -> Prompt:
        """Tokenize and check a job. Raises PromptError. Pure; any thread."""
        num_dropped, param = 0, "messages" if isinstance(job, ChatJob) else job.param
        try:
            if isinstance(job, ChatJob):
                token_ids, num_dropped = self._render_job(job)
            else:
                token_ids = self.encode(job.prompt, param, self.context_length)
        except PromptTooLong as error:
            wanted = job.sampling.max_tokens
            raise ContextOverflow(error.min_tokens, wanted, self.context_length, param, is_minimum=True) from None
        if not token_ids:
            raise PromptError("The prompt must hold at least one token.", param)
        if (unknown := self._unknown_id([i for i, _ in job.sampling.logit_bias])) is not None:
            raise PromptError(f"Invalid key in 'logit_bias': {unknown}. This model has no such token.", "logit_bias")
        num_left = self.context_length - len(token_ids)
        max_tokens = job.sampling.max_tokens
        if job.max_tokens_is_default:
            max_tokens = max(1, min(max_tokens, num_left))
        if max_tokens > num_left:
            raise ContextOverflow(len(token_ids), max_tokens, self.context_length, param)
        own = frozenset[int]() if job.ignore_eos else self.chat_format.stop_token_ids
        sampling = replace(job.sampling, max_tokens=max_tokens, stop_token_ids=own | job.sampling.stop_token_ids)
        n = max(job.n, job.best_of) if isinstance(job, CompletionJob) else job.n
        before = self._before(job, token_ids)
        spec = self._answer_spec(job, token_ids)
        return Prompt(tuple(token_ids), sampling, job.stop, n, spec, before, num_dropped)

    def encode(self, raw: str | Sequence[int], param: str, context_length: int | None = None) -> list[int]:
        """The ids of a raw prompt, which may be ids already; see `ChatFormat.encode`. Errors name `param`."""
        try:
            token_ids = self.chat_format.encode(raw, context_length) if isinstance(raw, str) else list(raw)
        except PromptTooLong:
            raise
        except PromptError as error:
            raise PromptError(error.message, param) from None
        self._check_ids(token_ids, param)
        return token_ids

    def _check_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Raises PromptError for ids that the network does not have, whatever the tokenizer says."""
        if (unknown := self._unknown_id(token_ids)) is not None:
            raise PromptError(f"This model has no token {unknown}.", param)

    def _unknown_id(self, token_ids: Sequence[int]) -> int | None:
        ends = (min(token_ids, default=0), max(token_ids, default=0))
        return next((token_id for token_id in ends if not 0 <= token_id < self.num_tokens), None)

    def _render_job(self, job: ChatJob) -> tuple[list[int], int]:
        """(the prompt, the number of rounds dropped from it). Where the client named no length, rounds are dropped
        until a quarter of the context is left: else the answers of a long conversation would shrink to one token."""
        if not self.drops_oldest_rounds:
            return self.render(job.conversation, self.context_length), 0
        wanted = job.sampling.max_tokens
        if job.max_tokens_is_default:
            wanted = min(wanted, self.context_length // 4)

        def if_it_fits(conversation: Conversation) -> list[int] | None:
            try:
                token_ids = self.render(conversation, self.context_length)
            except PromptTooLong:
                return None
            return token_ids if len(token_ids) + wanted <= self.context_length else None

        if (whole := if_it_fits(job.conversation)) is not None:
            return whole, 0
        shorter = history.drop_oldest(job.conversation, lambda some: if_it_fits(some) is not None)
        conversation, num_dropped = shorter or (job.conversation, 0)
        return self.render(conversation, self.context_length), num_dropped

    def _before(self, job: ChatJob | CompletionJob, token_ids: list[int]) -> tuple[int, ...]:
        """The text tokens at the prompt's end, if the answer continues their text: its first space counts then."""
        if isinstance(job, ChatJob) and not job.begun:
            return ()
        count = 0
        while count < min(WINDOW, len(token_ids)) and self.chat_format.token_bytes(token_ids[-1 - count]):
            count += 1
        return tuple(token_ids[len(token_ids) - count :])

    def render(self, conversation: Conversation, context_length: int | None = None) -> list[int]:
        """The complete prompt of a conversation, for models without a tool syntax too; see `ChatFormat.render`."""
        if conversation.uses_tools and self.chat_format.tool_syntax is None:
            token_ids = tool_prompt.render(self.chat_format, conversation, context_length)
        else:
            token_ids = self.chat_format.render(conversation, context_length)
        self._check_ids(token_ids, "messages")
        return token_ids

    def start(
        self, prompt: Prompt, queue: OutputQueue[TokenOutput], first_index: int, priority: int
    ) -> list[OutputProcessor]:
        """Start a prompt's answers in the engine; the i-th one's outputs come into `queue` as first_index + i.

        Returns the processors of each answer's outputs. Raises EngineError.
        """
        samplings = [_nth(prompt.sampling, choice) for choice in range(prompt.n)]
        answer = prompt.answer
        masks = [answer.mask() if answer.mask else None for _ in range(prompt.n)]
        self.engine.generate(prompt.token_ids, samplings, queue, first_index, priority, masks)
        num_prompt_tokens, ends = len(prompt.token_ids), prompt.sampling.stop_token_ids
        return [
            OutputProcessor(
                answer.decode,
                self.chat_format.token_bytes,
                answer.parser(),
                prompt.stop,
                num_prompt_tokens,
                ends,
                prompt.before,
                has_logprobs=prompt.sampling.num_top_logprobs is not None,
                reasoning=answer.reasoning() if answer.reasoning else None,
                custom_tools=answer.custom_tools,
            )
            for _ in range(prompt.n)
        ]

    def _answer_spec(self, job: ChatJob | CompletionJob, token_ids: Sequence[int]) -> AnswerSpec:
        """token_ids: the prompt, which may end with the opening mark of the reasoning."""
        if isinstance(job, CompletionJob):
            return AnswerSpec(PlainTextParser, self.chat_format.decode)
        reasoning = None
        if job.may_reason and self.chat_format.has_reasoning:
            end = self.chat_format.decode(token_ids[-MARK_TOKENS:]).rstrip()
            reasoning = partial(ReasoningSplitter, end.endswith(OPENING))
        custom_tools = frozenset(tool.name for tool in job.conversation.tools if tool.is_custom)
        return replace(self._parsed_spec(job), reasoning=reasoning, custom_tools=custom_tools)

    def _parsed_spec(self, job: ChatJob) -> AnswerSpec:
        """The grammar and the parser of a chat answer."""
        if not job.needs_grammar:
            return AnswerSpec(lambda: self.chat_format.parser(job.begun), self.chat_format.decode)
        if not self.engine.capabilities.has_masks:
            param = "tools" if job.constraint is None else job.constraint.param
            raise PromptError("The engine of this server does not support structured outputs.", param)
        tools = job.conversation.tools
        return build_answer_spec(self.chat_format, self.grammars, job.constraint, tools, job.tool_use, job.begun)


def _nth(sampling: SamplingParams, choice: int) -> SamplingParams:
    """The same settings with a seed of its own for each choice; choice 0 is what n=1 would give."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + choice)
