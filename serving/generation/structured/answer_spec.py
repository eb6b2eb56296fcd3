"""Response format, tools and tool choice of one request -> the grammar, mask, parser and decoding of its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from serving.generation.interface import ChatFormat, PromptError, Tool, ToolSyntax
from serving.generation.output_processor import AnswerSpec
from serving.generation.structured.grammar import (
    ANY_ARGUMENTS,
    AnswerConstraint,
    JsonAnswer,
    ToolUse,
    answer_grammar,
    arguments_schema,
    call_grammars,
    forced_grammar,
    json_or_calls_grammar,
)
from serving.generation.structured.schema_parser import Work
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
    work = Work()
    if constraint is not None:
        grammar = grammars.compile(answer_grammar(constraint, work), _description(constraint), constraint.param)
        if not tools:
            return AnswerSpec(ConstrainedText, _decode_bytes(chat_format), grammar.new_mask)
    syntax = chat_format.tool_syntax or PLAIN
    tools = tuple(tool for tool in tools if use.name in (None, tool.name))  # no other can be called
    names = tuple(tool.name for tool in tools)
    schemas = _argument_schemas(tools, syntax, grammars, use, work)
    if use.is_required:
        grammar = _compile(grammars, forced_grammar(syntax, schemas, use))
        return AnswerSpec(
            lambda: ToolCallParser(syntax, names, ConstrainedText(), is_forced=True),
            _decode_bytes(chat_format),
            grammar.new_mask,
        )
    if isinstance(constraint, JsonAnswer):
        grammar = _compile(grammars, json_or_calls_grammar(constraint, syntax, schemas, use))
        at_start = replace(syntax, is_at_start=True)  # an opening inside of a document is its text
        return AnswerSpec(
            lambda: ToolCallParser(at_start, names, ConstrainedText(), is_forced=False),
            _decode_bytes(chat_format),
            grammar.new_mask,
        )
    bodies, between = call_grammars(syntax, schemas, use)
    compiled = {opening: _compile(grammars, text) for opening, text in bodies.items()}
    more = None if between is None else _compile(grammars, between)
    return AnswerSpec(
        lambda: ToolCallParser(syntax, names, chat_format.parser(answer_prefix), is_forced=False),
        chat_format.decode,
        lambda: ToolCallMask(compiled, more, grammars.vocabulary, syntax.is_at_start),
    )


def _description(constraint: AnswerConstraint) -> str:
    """How error messages call the constraint."""
    if isinstance(constraint, JsonAnswer):
        return f"schema for {constraint.param} '{constraint.name}'"
    return f"'{constraint.param}'"


def _argument_schemas(
    tools: tuple[Tool, ...], syntax: ToolSyntax, grammars: Grammars, use: ToolUse, work: Work
) -> dict[str, dict[str, Any]]:
    """What is compiled for each tool's arguments: any object where its schema is not supported and need not be.

    Raises PromptError for a tool that is strict, or that a required call may name.
    """
    schemas: dict[str, dict[str, Any]] = {}
    one_call = ToolUse(is_required=True, is_parallel=False)
    for tool in tools:
        try:
            schema = arguments_schema(tool, work)
            alone = forced_grammar(syntax, {tool.name: schema}, one_call)
            grammars.compile(alone, f"schema for function '{tool.name}'", "tools")
        except PromptError:
            if use.is_required or tool.strict:
                raise
            schema = ANY_ARGUMENTS
        schemas[tool.name] = schema
    return schemas


def _compile(grammars: Grammars, grammar: str) -> Grammar:
    return grammars.compile(grammar, "'tools'", "tools")


def _decode_bytes(chat_format: ChatFormat) -> Callable[[Sequence[int]], str]:
    """Decodes to the bytes that the grammar saw: a family's own decoding may drop or clean up spaces."""

    def decode(token_ids: Sequence[int]) -> str:
        return b"".join(map(chat_format.token_bytes, token_ids)).decode("utf-8", "replace")

    return decode
