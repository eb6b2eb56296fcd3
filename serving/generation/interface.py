"""The types of generation: conversations, the events of an answer, and the interface of chat formats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

from serving.engine.interface import EncoderInput
from serving.engine.outputs import TokenLogprob

Role = Literal["system", "user", "assistant", "tool"]
Language = Literal["zh", "en"]
AnswerEnd = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class ToolCall:
    """A function call that the model made earlier in the conversation. `arguments` is what the model wrote as JSON."""

    id: str
    name: str
    arguments: str

    @property
    def parsed_arguments(self) -> dict[str, Any] | str:
        """A JSON object, an empty one for no text; text that is not an object, such as a cut one, stays text."""
        if not self.arguments.strip():
            return {}
        try:
            parsed: object = json.loads(self.arguments)
        except (ValueError, RecursionError):
            return self.arguments
        return cast("dict[str, Any]", parsed) if isinstance(parsed, dict) else self.arguments


@dataclass(frozen=True)
class Message:
    """One turn. The API layer has turned the role `developer` into system and `function` into tool."""

    role: Role
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str = ""  # of an earlier answer, for templates that use it
    source: str = field(default="", compare=False)  # the request's field that it came from, for error messages


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool = False  # its calls must match `parameters`, or the request is refused
    is_custom: bool = False  # the client sees the text of its one argument


@dataclass(frozen=True)
class Conversation:
    """The input of a chat format."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    continue_final: bool = False  # the last message is the beginning of the answer
    template_arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])  # for chat templates with switches

    @property
    def uses_tools(self) -> bool:
        """Whether it offers tools or holds calls of tools or their results."""
        return bool(self.tools) or any(m.tool_calls or m.role == "tool" for m in self.messages)


@dataclass(frozen=True)
class ToolSyntax:
    """How a model writes a call: `opening`, `before`, the arguments as one JSON object, `after`.

    `{name}` in `opening` and `before` stands for the tool's name. Several calls are joined by `separator`. Once
    `opening` is complete, a grammar enforces the syntax, and calls are parsed by it.
    """

    opening: str
    before: str
    after: str
    separator: str = "\n"
    is_at_start: bool = False  # a call is the beginning of the answer or no call; else text may stand in front


class PromptError(Exception):
    """The client's fault: the request cannot become a prompt. `param` names the field of the request."""

    def __init__(self, message: str, param: str = "messages") -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class PromptTooLong(PromptError):
    """The prompt has more tokens than the context; it was not tokenized. `min_tokens`: it has at least so many."""

    def __init__(self, min_tokens: int, param: str) -> None:
        super().__init__(f"The {param} resulted in at least {min_tokens} tokens, more than the context has.", param)
        self.min_tokens = min_tokens


@dataclass(frozen=True)
class TextToken:
    """A token of an answer. `share`: what it has of the text, in UTF-8; a character may be split among tokens."""

    logprob: TokenLogprob
    share: bytes
    is_trimmed: bool = False  # the share lacks the white space that the token begins with


@dataclass(frozen=True)
class TextDelta:
    """More text of one answer. `tokens`: where log-probabilities are wanted, the tokens whose shares are the text."""

    text: str
    tokens: tuple[TextToken, ...] = ()
    num_tokens: int = 0


@dataclass(frozen=True)
class ReasoningDelta:
    """More of what the model thinks before it answers."""

    text: str
    num_tokens: int = 0


@dataclass(frozen=True)
class ToolCallDelta:
    """More of one tool call. `id` and `name` come once, with the first delta of each index."""

    index: int
    id: str | None
    name: str | None
    arguments: str  # JSON text; of a custom tool its input
    is_custom: bool = False


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer; the end token counts as generated."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0  # of the completion's


@dataclass(frozen=True)
class Finished:
    """The last event of one answer."""

    reason: AnswerEnd
    usage: Usage
    stop_string: str | None = None  # the one that ended the answer


@dataclass(frozen=True)
class RepeatedCall:
    """The model wrote a call that it had made before in the same answer: the answer is over."""


AnswerPart = TextDelta | ToolCallDelta | RepeatedCall
AnswerDelta = TextDelta | ReasoningDelta | ToolCallDelta
ChatEvent = AnswerDelta | Finished
IndexedEvent = tuple[int, ChatEvent]  # (which answer of the request, its event)


class AnswerParser(Protocol):
    """Text of one answer in pieces -> what the client gets (the family's post-processing).

    What was returned is final, so text that later text could still change is held back: trailing white space, the
    beginning of a placeholder.
    """

    def push(self, text: str) -> list[AnswerPart]: ...

    def flush(self) -> list[AnswerPart]:
        """Everything held back, at the end of the answer."""
        ...


class ChatFormat(Protocol):
    """The interface of families: conversation -> prompt ids, ids -> text. Pure; safe to call from any thread.

    A prompt is a list of ids, never a string that is parsed again: no text of a user can become a special token.
    """

    stop_token_ids: frozenset[int]
    num_tokens: int  # ids below this have a text (or are known specials)
    tool_syntax: ToolSyntax | None  # the one that the model was trained for; without one, `render` refuses tools
    language: Language  # that instructions to the model are written in
    has_reasoning: bool  # whether its models may think between <think> marks before they answer

    def render(self, conversation: Conversation, context_length: int | None = None) -> list[int]:
        """The complete prompt, special tokens included. Raises PromptError for what the format cannot express.

        context_length: PromptTooLong may be raised for a prompt of more tokens, instead of tokenizing it.
        """
        ...

    def encode(self, text: str, context_length: int | None = None) -> list[int]:
        """A raw text prompt (`/v1/completions`) with the model's own prefix, if it has one. Raises as `render`."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a run of ids. Special tokens give ''; an incomplete character gives U+FFFD."""
        ...

    def parser(self, begun: str = "") -> AnswerParser:
        """A new parser for the text of one answer; calls of tools are parsed by `tool_syntax`.

        begun: the beginning of the answer that the client gave. The text after it keeps its leading white space.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token inside a text; b'' for special tokens. For logprobs and grammars."""
        ...


class EncoderTokenizer(Protocol):
    """The interface of an encoder's tokenizer. Safe to call from any thread."""

    def encode(self, text: str) -> EncoderInput:
        """With the special tokens that the model was trained with; a text has none of them."""
        ...

    def encode_pair(self, first: str, second: str, max_second: int | None = None) -> EncoderInput:
        """max_second: tokens that are kept of the second text."""
        ...

    def truncated(self, given: EncoderInput, max_tokens: int) -> EncoderInput:
        """Without the last tokens of the text, or of the second text; the special tokens stay."""
        ...
