"""Response format, tools and tool choice of one request -> the grammar, mask, parser and decoding of its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

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

Made = TypeVar("Made")


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
        text = answer_grammar(constraint, work)
        if not tools:
            grammar = grammars.compile(text, _description(constraint), constraint.param)
            return AnswerSpec(ConstrainedText, _decode_bytes(chat_format), grammar.new_mask)
    syntax = chat_format.tool_syntax or PLAIN
    calls = _Calls(tools, syntax, use, grammars, work)
    if use.is_required:
        grammar = calls.compile(lambda schemas: _compile(grammars, forced_grammar(syntax, schemas, use)))
        return AnswerSpec(
            lambda: ToolCallParser(syntax, calls.names, ConstrainedText(), is_forced=True),
            _decode_bytes(chat_format),
            grammar.new_mask,
        )
    if isinstance(constraint, JsonAnswer):
        document = constraint
        try:
            grammar = calls.compile(lambda s: _compile(grammars, json_or_calls_grammar(document, syntax, s, use)))
        except PromptError:
            grammars.compile(text, _description(constraint), constraint.param)  # raises if it is the one at fault
            raise
        at_start = replace(syntax, is_at_start=True)  # an opening inside of a document is its text
        return AnswerSpec(
            lambda: ToolCallParser(at_start, calls.names, ConstrainedText(), is_forced=False),
            _decode_bytes(chat_format),
            grammar.new_mask,
        )
    bodies, between = calls.compile(lambda schemas: _compile_calls(grammars, call_grammars(syntax, schemas, use)))
    return AnswerSpec(
        lambda: ToolCallParser(syntax, calls.names, chat_format.parser(answer_prefix), is_forced=False),
        chat_format.decode,
        lambda: ToolCallMask(bodies, between, grammars.vocabulary, syntax.is_at_start),
    )


def _description(constraint: AnswerConstraint) -> str:
    """How error messages call the constraint."""
    if isinstance(constraint, JsonAnswer):
        return f"schema for {constraint.param} '{constraint.name}'"
    return f"'{constraint.param}'"


class _Calls:
    """The tools that can be called, and the schemas of their arguments.

    A schema that is not supported is refused if the tool is strict or a call is required; else any object is accepted.
    """

    def __init__(
        self, tools: tuple[Tool, ...], syntax: ToolSyntax, use: ToolUse, grammars: Grammars, work: Work
    ) -> None:
        """Raises PromptError."""
        self._tools = [tool for tool in tools if use.name in (None, tool.name)]  # no other can be called
        self._syntax = syntax
        self._is_required = use.is_required
        self._grammars = grammars
        self.names = tuple(tool.name for tool in self._tools)
        self._schemas: dict[str, dict[str, Any]] = {}
        for tool in self._tools:
            self._set(tool, partial(arguments_schema, tool, work))

    def _set(self, tool: Tool, schema: Callable[[], dict[str, Any]]) -> None:
        try:
            self._schemas[tool.name] = schema()
        except PromptError:
            if self._is_required or tool.strict:
                raise
            self._schemas[tool.name] = ANY_ARGUMENTS

    def compile(self, make: Callable[[dict[str, dict[str, Any]]], Made]) -> Made:
        """What `make` makes of the schemas. If it cannot, each tool is compiled alone, to find those at fault."""
        try:
            return make(self._schemas)
        except PromptError:
            for tool in self._tools:
                self._set(tool, partial(self._compiled_alone, tool))
        try:
            return make(self._schemas)
        except PromptError:  # they are too complex together
            for tool in self._tools:
                self._set(tool, partial(self._refused, tool))
            return make(self._schemas)

    def _refused(self, tool: Tool) -> dict[str, Any]:
        raise PromptError(f"Invalid schema for function '{tool.name}': all tools together are too complex.", "tools")

    def _compiled_alone(self, tool: Tool) -> dict[str, Any]:
        schema = self._schemas[tool.name]
        text = forced_grammar(self._syntax, {tool.name: schema}, ToolUse(is_required=True, is_parallel=False))
        self._grammars.compile(text, f"schema for function '{tool.name}'", "tools")
        return schema


def _compile(grammars: Grammars, grammar: str) -> Grammar:
    return grammars.compile(grammar, "'tools'", "tools")


def _compile_calls(
    grammars: Grammars, texts: tuple[dict[str, str], str | None]
) -> tuple[dict[str, Grammar], Grammar | None]:
    bodies, between = texts
    compiled = {opening: _compile(grammars, text) for opening, text in bodies.items()}
    return compiled, None if between is None else _compile(grammars, between)


def _decode_bytes(chat_format: ChatFormat) -> Callable[[Sequence[int]], str]:
    """Decodes to the bytes that the grammar saw: a family's own decoding may drop or clean up spaces."""

    def decode(token_ids: Sequence[int]) -> str:
        return b"".join(map(chat_format.token_bytes, token_ids)).decode("utf-8", "replace")

    return decode
