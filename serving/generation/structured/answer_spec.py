"""Response format, tools and tool choice of one request -> the grammar, mask, parser and decoding of its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from serving.generation.interface import ChatFormat, PromptError, Tool, ToolSyntax
from serving.generation.output_processor import AnswerSpec
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


def build_answer_spec(
    chat_format: ChatFormat,
    grammars: Grammars,
    constraint: AnswerConstraint | None,
    tools: tuple[Tool, ...],
    use: ToolUse,
    answer_prefix: str = "",
) -> AnswerSpec:
    """Compiles the grammars of a request that has a constraint, tools or both. CPU-bound: call it in a worker thread.

    answer_prefix: the text that the answer continues, if the client gave one.
    Raises PromptError for a schema, pattern or list of choices that cannot be enforced.
    """
    if constraint is not None:
        grammar = grammars.compile(answer_grammar(constraint), _description(constraint), constraint.param)
        if not tools:
            return AnswerSpec(ConstrainedText, _decode_bytes(chat_format), grammar.new_mask)
    syntax = chat_format.tool_syntax or PLAIN
    names = tuple(tool.name for tool in tools)
    enforced = tuple(_enforceable(tool, syntax, grammars, use.is_required or tool.strict) for tool in tools)
    if use.is_required:
        grammar = _compile(grammars, forced_grammar(syntax, enforced, use))
        return AnswerSpec(
            lambda: ToolCallParser(syntax, names, ConstrainedText(), is_forced=True),
            _decode_bytes(chat_format),
            grammar.new_mask,
        )
    if isinstance(constraint, JsonAnswer):
        grammar = _compile(grammars, json_or_calls_grammar(constraint, syntax, enforced, use))
        at_start = replace(syntax, is_at_start=True)  # an opening inside of a document is its text
        return AnswerSpec(
            lambda: ToolCallParser(at_start, names, ConstrainedText(), is_forced=False),
            _decode_bytes(chat_format),
            grammar.new_mask,
        )
    by_opening = {opening: _compile(grammars, text) for opening, text in call_grammars(syntax, enforced, use).items()}
    return AnswerSpec(
        lambda: ToolCallParser(syntax, names, chat_format.parser(answer_prefix), is_forced=False),
        chat_format.decode,
        lambda: ToolCallMask(by_opening, grammars.vocabulary, syntax.is_at_start),
    )


def _description(constraint: AnswerConstraint) -> str:
    """How error messages call the constraint."""
    if isinstance(constraint, JsonAnswer):
        return f"schema for {constraint.param} '{constraint.name}'"
    return f"'{constraint.param}'"


def _enforceable(tool: Tool, syntax: ToolSyntax, grammars: Grammars, must_enforce: bool) -> Tool:
    """The tool; with any object for arguments if its schema cannot be compiled and the request allows that.

    must_enforce: the tool is strict or a call is required. Raises PromptError then.
    """
    what = f"schema for function '{tool.name}'"
    try:
        check_schema(tool.parameters, what, "tools", tool.strict)
        grammars.compile(forced_grammar(syntax, [tool], ToolUse(is_required=True, is_parallel=False)), what, "tools")
    except PromptError:
        if must_enforce:
            raise
        return replace(tool, parameters={})
    return tool


def _compile(grammars: Grammars, grammar: str) -> Grammar:
    return grammars.compile(grammar, "'tools'", "tools")


def _decode_bytes(chat_format: ChatFormat) -> Callable[[Sequence[int]], str]:
    """Decodes to the bytes that the grammar saw: a family's own decoding may drop or clean up spaces."""

    def decode(token_ids: Sequence[int]) -> str:
        return b"".join(map(chat_format.token_bytes, token_ids)).decode("utf-8", "replace")

    return decode
