"""What a chat request asks of an answer's form, and how its tools may be used. Pydantic models and their rules.

Knows neither grammars nor prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, StringConstraints, Tag, model_validator
from pydantic_core import PydanticCustomError

from serving.openai.chat.messages import STRICT, ChatMessage, FunctionDefinition, ToolDefinition

FormatName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Choices = Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=1024)]], Field(min_length=1)]
Pattern = Annotated[str, StringConstraints(min_length=1)]


def text_or_object(value: Any) -> str | None:
    """Which branch of a `string | object` field a value takes; the tags never show in an error's path."""
    if isinstance(value, str):
        return "<string>"
    return "<object>" if isinstance(value, dict | BaseModel) else None


_EITHER = Discriminator(text_or_object, custom_error_type="string_or_object", custom_error_message="string or object")


class JsonSchemaFormat(BaseModel):
    """`response_format.json_schema`. It is enforced in any case; with `strict` it must also keep OpenAI's rules."""

    model_config = STRICT
    name: FormatName
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Plain text, any JSON object, or what a schema describes."""

    model_config = STRICT
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            message = (
                "Missing required parameter: 'response_format.json_schema'."
                if self.json_schema is None
                else "'json_schema' is only allowed with the type 'json_schema'."
            )
            raise conflict("json_schema", message)
        return self


class ChosenFunction(BaseModel):
    """The name of one function."""

    model_config = STRICT
    name: str


class NamedTool(BaseModel):
    """The tool that has to be called."""

    model_config = STRICT
    type: Literal["function"]
    function: ChosenFunction


class AllowedTools(BaseModel):
    """Some of the tools, to be used if the model wants to, or in any case."""

    model_config = STRICT
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128)]


class AllowedToolsChoice(BaseModel):
    """OpenAI's way to keep one list of tools and offer a part of it."""

    model_config = STRICT
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_kind(value: Any) -> str | None:
    kind = text_or_object(value)
    if kind == "<object>" and isinstance(value, dict) and value.get("type") == "allowed_tools":
        return "<allowed>"
    return kind


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<string>")]
    | Annotated[NamedTool, Tag("<object>")]
    | Annotated[AllowedToolsChoice, Tag("<allowed>")],
    Discriminator(_choice_kind, custom_error_type="string_or_object", custom_error_message="string or object"),
]
FunctionChoice = Annotated[
    Annotated[Literal["none", "auto"], Tag("<string>")] | Annotated[ChosenFunction, Tag("<object>")], _EITHER
]
GuidedJson = Annotated[
    Annotated[str, StringConstraints(max_length=1_000_000), Tag("<string>")]
    | Annotated[dict[str, Any], Tag("<object>")],
    _EITHER,
]


def conflict(param: str, message: str) -> PydanticCustomError:
    """Two fields do not go together; `param` is the one to name."""
    return PydanticCustomError("conflict", "{message}", {"message": message, "param": param})


def check_tools(tools: Sequence[ToolDefinition], choice: Any) -> None:
    """Names are unique, and `tool_choice` names one of them."""
    names = [tool.function.name for tool in tools]
    _check_names("tools", names)
    if choice not in (None, "none", "auto") and not tools:
        raise conflict("tool_choice", "'tool_choice' is only allowed when 'tools' are specified.")
    chosen = [choice] if isinstance(choice, NamedTool) else []
    if isinstance(choice, AllowedToolsChoice):
        chosen = choice.allowed_tools.tools
    for tool in chosen:
        _check_chosen("tool_choice", "tools", tool.function.name, names)


def check_functions(
    functions: Sequence[FunctionDefinition], choice: Any, tools: Sequence[ToolDefinition], tool_choice: Any
) -> None:
    """The same for the legacy fields, which exclude the new ones."""
    if functions and (tools or tool_choice is not None):
        raise conflict("functions", "'functions' is the old name of 'tools': they cannot be used together.")
    if choice is not None and not functions:
        raise conflict("function_call", "'function_call' is only allowed when 'functions' are specified.")
    names = [function.name for function in functions]
    _check_names("functions", names)
    if isinstance(choice, ChosenFunction):
        _check_chosen("function_call", "functions", choice.name, names)


def _check_names(field: str, names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise conflict(field, f"Function names must be unique: '{name}' occurs twice in '{field}'.")


def _check_chosen(param: str, field: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise conflict(
            param, f"Invalid value for '{param}': no function named '{name[:64]}' was specified in '{field}'."
        )


def check_tool_messages(messages: Sequence[ChatMessage]) -> None:
    """Every tool message answers a call of the assistant message before it, and every call is answered."""
    open_calls: dict[str, int] = {}
    answered: set[str] = set()
    for index, message in enumerate(messages):
        if message.role == "tool":
            if message.tool_call_id not in open_calls and message.tool_call_id not in answered:
                raise conflict(
                    f"messages[{index}].role",
                    "Invalid parameter: messages with role 'tool' must be a response to a preceding message with "
                    "'tool_calls' and its 'tool_call_id'.",
                )
            answered.add(message.tool_call_id or "")
            open_calls.pop(message.tool_call_id or "", None)
            continue
        _check_answered(index, open_calls)
        open_calls, answered = {call.id: index for call in message.tool_calls or []}, set()
    _check_answered(len(messages), open_calls)


def _check_answered(index: int, open_calls: dict[str, int]) -> None:
    if open_calls:
        missing = ", ".join(call_id[:64] for call_id in open_calls)
        raise conflict(
            f"messages[{index - 1}].role",
            "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
            f"'tool_call_id'. The following tool_call_ids did not have response messages: {missing}",
        )
