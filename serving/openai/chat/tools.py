"""Tool definitions and `tool_choice` of a request -> the tools offered to the model and how it may use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, Discriminator, Field, StringConstraints, Tag, model_validator

from serving.generation.interface import Tool
from serving.generation.structured.grammar import ToolUse
from serving.generation.tools.custom import custom_tool
from serving.http.errors import invalid
from serving.openai.common import StrictModel
from serving.openai.validation import rejected

MAX_TOOLS = 128
NO_LARK = "Grammars in Lark are not supported, only regular expressions ('syntax': 'regex')."
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class ToolSelection:
    """The `tool_choice` of any endpoint."""

    mode: Mode = "auto"
    function: str | None = None  # has to be called
    allowed: tuple[str, ...] | None = None  # are offered; None: all tools

    def offered(self, tools: Sequence[Tool]) -> tuple[Tool, ...]:
        """The tools that the prompt describes."""
        if self.mode == "none":
            return ()
        return tuple(tool for tool in tools if self.allowed is None or tool.name in self.allowed)

    def tool_use(self, is_parallel: bool) -> ToolUse:
        return ToolUse(self.mode == "required", self.function, is_parallel and self.function is None)


class FunctionDefinition(StrictModel):
    """What the model is told about a function. `strict`: its arguments always fit `parameters`."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def tool(self) -> Tool:
        """The definition without its JSON wrapping."""
        return Tool(self.name, self.description or "", self.parameters or {}, bool(self.strict))


class GrammarDefinition(StrictModel):
    """What an input must look like; `definition` is a regular expression."""

    syntax: Literal["lark", "regex"]
    definition: str

    @model_validator(mode="after")
    def _is_a_pattern(self) -> Self:
        if self.syntax == "lark":
            raise rejected(NO_LARK, "syntax", "unsupported_value")
        return self


class CustomFormat(StrictModel):
    """Any text, or text that follows a grammar."""

    type: Literal["text", "grammar"]
    grammar: GrammarDefinition | None = None

    @model_validator(mode="after")
    def _kind_fits(self) -> Self:
        if (self.type == "grammar") != (self.grammar is not None):
            raise rejected("'grammar' goes with the type 'grammar', and only with it.", "grammar")
        return self


class CustomDefinition(StrictModel):
    """What the model is told about a tool that takes text."""

    name: FunctionName
    description: str | None = None
    format: CustomFormat | None = None

    @property
    def tool(self) -> Tool:
        grammar = None if self.format is None else self.format.grammar
        return custom_tool(self.name, self.description or "", None if grammar is None else grammar.definition)


class OneOfBoth(StrictModel):
    """An object with a field of the name that `type` says."""

    type: Literal["function", "custom"]

    @model_validator(mode="after")
    def _kind_fits(self) -> Self:
        for kind in ("function", "custom"):
            if kind == self.type and getattr(self, kind) is None:
                raise rejected(f"Missing required parameter: '{kind}'.", kind, "missing_required_parameter")
            if kind != self.type and getattr(self, kind) is not None:
                raise rejected(f"'{kind}' does not go with the type '{self.type}'.", kind)
        return self

    @property
    def name(self) -> str:
        return str(getattr(self, self.type).name)


class ToolDefinition(OneOfBoth):
    """One entry of `tools`."""

    function: FunctionDefinition | None = None
    custom: CustomDefinition | None = None

    @property
    def tool(self) -> Tool:
        described = self.function or self.custom
        assert described is not None
        return described.tool


class ChosenFunction(StrictModel):
    """The name of the function or tool that has to be called."""

    name: FunctionName

    @property
    def selection(self) -> ToolSelection:
        return ToolSelection("required", self.name)


class NamedTool(OneOfBoth):
    """The tool that has to be called."""

    function: ChosenFunction | None = None
    custom: ChosenFunction | None = None

    @property
    def selection(self) -> ToolSelection:
        return ToolSelection("required", self.name)


class AllowedTools(StrictModel):
    """Some of the tools, to be used if the model wants to, or in any case."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(StrictModel):
    """OpenAI's way to keep one list of tools and offer a part of it."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools

    @property
    def selection(self) -> ToolSelection:
        names = tuple(tool.name for tool in self.allowed_tools.tools)
        return ToolSelection(self.allowed_tools.mode, allowed=names)


def text_or_object(value: Any) -> str | None:
    """Which branch of a `string | object` field a value takes; the tags never show in an error's path."""
    if isinstance(value, str):
        return "<string>"
    return "<object>" if isinstance(value, dict | BaseModel) else None


def _choice_kind(value: Any) -> str | None:
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        return "<allowed>"
    return text_or_object(value)


STRING_OR_OBJECT = Discriminator(
    text_or_object, custom_error_type="string_or_object", custom_error_message="string or object"
)
STRING_OR_CHOICE = Discriminator(
    _choice_kind, custom_error_type="string_or_object", custom_error_message="string or object"
)
ToolChoice = Annotated[
    Annotated[Mode, Tag("<string>")]
    | Annotated[NamedTool, Tag("<object>")]
    | Annotated[AllowedToolsChoice, Tag("<allowed>")],
    STRING_OR_CHOICE,
]
FunctionChoice = Annotated[
    Annotated[Literal["none", "auto"], Tag("<string>")] | Annotated[ChosenFunction, Tag("<object>")], STRING_OR_OBJECT
]


class Choice(Protocol):
    """A `tool_choice` or `function_call` of any endpoint that is an object."""

    @property
    def selection(self) -> ToolSelection: ...


def to_selection(choice: Mode | Choice | None) -> ToolSelection:
    if choice is None:
        return ToolSelection()
    return ToolSelection(choice) if isinstance(choice, str) else choice.selection


def check_tools(
    names: Sequence[str], selection: ToolSelection, field: str = "tools", param: str = "tool_choice"
) -> None:
    """Raises APIError 400 unless the names in `field` are unique and the choice in `param` names only some of them."""
    for index, name in enumerate(names):
        if name in names[:index]:
            raise invalid(f"Function names must be unique: '{name}' occurs twice in '{field}'.", field)
    if selection not in (ToolSelection("none"), ToolSelection("auto")) and not names:
        raise invalid(f"'{param}' is only allowed when '{field}' are specified.", param)
    chosen = (selection.allowed or ()) if selection.function is None else (selection.function,)
    for name in chosen:
        if name not in names:
            message = f"Invalid value for '{param}': no function named '{name[:64]}' was specified in '{field}'."
            raise invalid(message, param)


def check_functions(functions: Sequence[FunctionDefinition], choice: FunctionChoice | None, has_tools: bool) -> None:
    """The same for the legacy fields. has_tools: `tools` or `tool_choice` are given, which excludes them."""
    if functions and has_tools:
        raise invalid("'functions' is the old name of 'tools': they cannot be used together.", "functions")
    if choice is not None and not functions:
        raise invalid("'function_call' is only allowed when 'functions' are specified.", "function_call")
    check_tools([function.name for function in functions], to_selection(choice), "functions", "function_call")
