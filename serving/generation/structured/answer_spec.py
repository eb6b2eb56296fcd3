"""How one job's answers are held to a form and read: grammar, mask and reader. Decides; the parts do the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from serving.engine.interface import TokenMask
from serving.generation.interface import AnswerParser, ChatFormat, PromptError, Tool, ToolSyntax
from serving.generation.structured.grammar import (
    AnswerConstraint,
    JsonAnswer,
    ToolUse,
    answer_grammar,
    call_grammars,
    forced_grammar,
    json_or_calls_grammar,
)
from serving.generation.structured.json_schema import check_schema
from serving.generation.structured.token_masks import Grammar, Grammars, ToolCallMask
from serving.generation.tools.call_parser import ConstrainedText, ToolCallParser
from serving.generation.tools.prompt import PLAIN


@dataclass(frozen=True)
class AnswerSpec:
    """Makes what each answer needs of its own."""

    parser: Callable[[], AnswerParser]
    decode: Callable[[Sequence[int]], str]
    mask: Callable[[], TokenMask] | None = None


def build_answer_spec(
    chat_format: ChatFormat,
    grammars: Grammars,
    constraint: AnswerConstraint | None,
    tools: tuple[Tool, ...],
    use: ToolUse,
    begun: str = "",
) -> AnswerSpec:
    """Compiles what has to be compiled: for a worker thread, if there is a constraint or a tool. Raises PromptError.

    begun: the beginning of the answer, if the client gave one.
    """
    if constraint is not None:
        grammar = grammars.compile(answer_grammar(constraint), _what(constraint), constraint.param)
        if not tools:
            return AnswerSpec(ConstrainedText, _decode_bytes(chat_format), grammar.walk)
    if not tools:
        return AnswerSpec(lambda: chat_format.parser(begun), chat_format.decode)
    syntax = chat_format.tool_syntax or PLAIN
    names = tuple(tool.name for tool in tools)
    kept = tuple(_enforceable(tool, syntax, grammars, use.is_required or tool.strict) for tool in tools)
    if use.is_required:
        grammar = _compile(grammars, forced_grammar(syntax, kept, use))
        return AnswerSpec(
            lambda: ToolCallParser(syntax, names, ConstrainedText(), is_forced=True),
            _decode_bytes(chat_format),
            grammar.walk,
        )
    if isinstance(constraint, JsonAnswer):
        grammar = _compile(grammars, json_or_calls_grammar(constraint, syntax, kept, use))
        at_start = replace(syntax, is_at_start=True)  # an opening inside of a document is its text
        return AnswerSpec(
            lambda: ToolCallParser(at_start, names, ConstrainedText(), is_forced=False),
            _decode_bytes(chat_format),
            grammar.walk,
        )
    by_opening = {opening: _compile(grammars, text) for opening, text in call_grammars(syntax, kept, use).items()}
    return AnswerSpec(
        lambda: ToolCallParser(syntax, names, chat_format.parser(begun), is_forced=False),
        chat_format.decode,
        lambda: ToolCallMask(by_opening, grammars.vocabulary, syntax.is_at_start),
    )


def _what(constraint: AnswerConstraint) -> str:
    """What a refusal calls it."""
    if isinstance(constraint, JsonAnswer):
        return f"schema for response_format '{constraint.name}'"
    return f"'{constraint.param}'"


def _enforceable(tool: Tool, syntax: ToolSyntax, grammars: Grammars, is_enforced: bool) -> Tool:
    """The tool, or, if its schema has no grammar and nobody insists on it, the tool with any object for arguments."""
    what = f"schema for function '{tool.name}'"
    try:
        check_schema(tool.parameters, what, "tools", tool.strict)
        grammars.compile(forced_grammar(syntax, [tool], ToolUse(is_required=True, is_parallel=False)), what, "tools")
    except PromptError:
        if is_enforced:
            raise
        return replace(tool, parameters={})
    return tool


def _compile(grammars: Grammars, grammar: str) -> Grammar:
    return grammars.compile(grammar, "'tools'", "tools")


def _decode_bytes(chat_format: ChatFormat) -> Callable[[Sequence[int]], str]:
    """What the grammar saw, byte for byte: a family's own decoding may drop or clean up spaces."""

    def decode(token_ids: Sequence[int]) -> str:
        return b"".join(map(chat_format.token_bytes, token_ids)).decode("utf-8", "replace")

    return decode
