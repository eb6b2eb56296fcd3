"""Tools of a request for a response and the choice among them, in the flat shape of this endpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from serving.generation.interface import Tool
from serving.generation.tools.custom import custom_tool
from serving.openai.chat.tools import (
    MAX_TOOLS,
    NO_LARK,
    STRING_OR_CHOICE,
    FunctionDefinition,
    FunctionName,
    Mode,
    ToolSelection,
)
from serving.openai.common import StrictModel
from serving.openai.validation import kind_of, rejected


def _known_tool(value: Any) -> Any:
    kind = kind_of(value)
    if isinstance(kind, str) and kind not in ("function", "custom"):
        message = f"Tools of type '{kind[:60]}' do not exist here, only 'function' and 'custom'."
        raise rejected(message, "type", "unsupported_value")
    return value


def _tool_kind(value: Any) -> str:
    return "<custom>" if kind_of(value) == "custom" else "<function>"


class FunctionTool(FunctionDefinition):
    """A function that the model may call, in the flat shape of this endpoint."""

    type: Literal["function"]


class CustomToolFormat(StrictModel):
    """Any text, or text that matches a regular expression."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.syntax == "lark":
            raise rejected(NO_LARK, "syntax", "unsupported_value")
        for name in ("syntax", "definition"):
            if (getattr(self, name) is not None) != (self.type == "grammar"):
                raise rejected(f"'{name}' goes with the type 'grammar', and only with it.", name)
        return self


class CustomTool(StrictModel):
    """A tool whose input is text."""

    type: Literal["custom"]
    name: FunctionName
    description: str | None = None
    format: CustomToolFormat | None = None

    @property
    def tool(self) -> Tool:
        return custom_tool(self.name, self.description or "", None if self.format is None else self.format.definition)


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("<function>")] | Annotated[CustomTool, Tag("<custom>")],
    Discriminator(_tool_kind),
    BeforeValidator(_known_tool),
]


class FunctionChoice(StrictModel):
    """The function or the tool that has to be called."""

    type: Literal["function", "custom"]
    name: FunctionName

    @property
    def selection(self) -> ToolSelection:
        return ToolSelection("required", self.name)


class AllowedFunctionsChoice(StrictModel):
    """Some of the functions, to be used if the model wants to, or in any case."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=MAX_TOOLS)]

    @property
    def selection(self) -> ToolSelection:
        return ToolSelection(self.mode, allowed=tuple(tool.name for tool in self.tools))


ToolChoice = Annotated[
    Annotated[Mode, Tag("<string>")]
    | Annotated[FunctionChoice, Tag("<object>")]
    | Annotated[AllowedFunctionsChoice, Tag("<allowed>")],
    STRING_OR_CHOICE,
]
