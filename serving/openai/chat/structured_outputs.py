"""`response_format` and vLLM's guided fields of a request -> the constraint that the answer is generated under."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, cast

from pydantic import Field, StringConstraints, Tag

from serving.generation.structured.grammar import AnswerConstraint, ChoiceAnswer, JsonAnswer, RegexAnswer
from serving.http.errors import invalid
from serving.openai.chat.tools import STRING_OR_OBJECT, FunctionName
from serving.openai.common import StrictModel

Choices = Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=1024)]], Field(min_length=1)]
Pattern = Annotated[str, StringConstraints(min_length=1)]
GuidedJson = Annotated[
    Annotated[str, StringConstraints(max_length=1_000_000), Tag("<string>")]
    | Annotated[dict[str, Any], Tag("<object>")],
    STRING_OR_OBJECT,
]


class JsonSchemaFormat(StrictModel):
    """`response_format.json_schema`. It is enforced in any case; with `strict` it must also keep OpenAI's rules."""

    name: FunctionName
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """Plain text, any JSON object, or what a schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(StrictModel):
    """vLLM's newer name of the guided fields; one of them."""

    json_: Annotated[GuidedJson | None, Field(alias="json")] = None
    regex: Pattern | None = None
    choice: Choices | None = None


class Guides(NamedTuple):
    """vLLM's fields for the answer's format."""

    json: str | dict[str, Any] | None
    regex: str | None
    choice: Sequence[str] | None


def check_response_format(response_format: ResponseFormat) -> None:
    """Raises APIError 400 for a type without its schema, and for the opposite."""
    if (response_format.type == "json_schema") != (response_format.json_schema is not None):
        param = "response_format.json_schema"
        if response_format.json_schema is None:
            raise invalid(f"Missing required parameter: '{param}'.", param)
        raise invalid("'json_schema' is only allowed with the type 'json_schema'.", param)


def check_formats(formats: Sequence[str], has_tools: bool, others: Mapping[str, bool]) -> None:
    """Raises APIError 400 if an answer would need two formats, or one is used with a field that breaks it.

    formats: the fields that describe the answer's format; others: whether these fields, which break one, are used.
    """
    if len(formats) > 1:
        first, second, *_ = formats
        raise invalid(f"'{first}' and '{second}' cannot be used together: an answer has one format.", second)
    if has_tools and formats and formats[0] in ("guided_regex", "guided_choice"):
        message = f"'{formats[0]}' cannot be used together with tools, unless their choice is 'none'."
        raise invalid(message, formats[0])
    for field, is_used in others.items():
        if is_used and (formats or has_tools):
            raise invalid(f"'{field}' cannot be used together with '{formats[0] if formats else 'tools'}'.", field)


def to_constraint(
    response_format: ResponseFormat | None,
    guided_json: str | dict[str, Any] | None,
    guided_regex: str | None,
    guided_choice: Sequence[str] | None,
) -> AnswerConstraint | None:
    """Raises APIError 400 for a text in `guided_json` that is no schema."""
    if response_format is not None and response_format.type == "json_object":
        return JsonAnswer({"type": "object"}, "response_format")
    if response_format is not None and response_format.json_schema is not None:
        described = response_format.json_schema
        return JsonAnswer(described.schema_, "response_format", described.name, bool(described.strict))
    if guided_json is not None:
        return JsonAnswer(_guided_schema(guided_json), "guided_json")
    if guided_regex is not None:
        return RegexAnswer(guided_regex, "guided_regex")
    if guided_choice is not None:
        return ChoiceAnswer(tuple(guided_choice), "guided_choice")
    return None


def _guided_schema(given: str | dict[str, Any]) -> dict[str, Any]:
    """vLLM takes the schema as an object or as its text."""
    if not isinstance(given, str):
        return given
    try:
        parsed: Any = json.loads(given)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise invalid("Invalid 'guided_json': expected a JSON schema, as an object or as its text.", "guided_json")
    return cast("dict[str, Any]", parsed)
