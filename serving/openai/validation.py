"""Pydantic's validation errors -> API errors with OpenAI's sentence, param and code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from serving.http.errors import APIError, invalid

EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "none_required": "null",
    "string_or_array": "a string or an array",
    "string_or_object": "a string or an object",
}
KINDS: dict[type, str] = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a decimal number",
    str: "a string",
    list: "an array",
}
# type of error: the limit's name in the error's context, the words, the code, the sign of what is allowed
BOUNDS = {
    "greater_than_equal": ("ge", "below minimum", "below_min", ">="),
    "greater_than": ("gt", "below minimum", "below_min", ">"),
    "less_than_equal": ("le", "above maximum", "above_max", "<="),
    "less_than": ("lt", "above maximum", "above_max", "<"),
}
# tags of unions: steps of pydantic's paths, no fields of the client's
TAGS = frozenset(
    (
        *("<string>", "<array>", "<texts>", "<ids>", "<id lists>", "[key]", "<object>", "<allowed>"),
        *("<text>", "<refusal>", "<message>", "<function_call>", "<function_call_output>", "<reasoning>"),
        *("<custom_tool_call>", "<custom_tool_call_output>", "<function>", "<custom>"),
        *("<tool_use>", "<tool_result>", "<thinking>", "<redacted_thinking>"),
    )
)
REJECTED = "rejected"


def rejected(message: str, field: str = "", code: str = "invalid_value") -> PydanticCustomError:
    """For validators of nested values: the value, or one of its fields, is wrong for a reason of ours.

    Validators of whole bodies raise an APIError, which passes through pydantic.
    """
    return PydanticCustomError(REJECTED, "{message}", {"message": message, "field": field, "code": code})


def kind_of(value: Any) -> Any:
    """The `type` of an object of a request, before it is validated or after; None for other values."""
    if isinstance(value, dict):
        return cast("dict[str, Any]", value).get("type")
    return getattr(value, "type", None)


def to_api_error(error: ValidationError) -> APIError:
    """400 that names the first field that is wrong."""
    # the context holds only plain values here, so no exception object travels with the details
    return _translate(error.errors(include_url=False)[0])


def remove_unknown(body: dict[str, Any], error: ValidationError) -> list[str]:
    """Take the fields that no type has out of `body`; returns their paths, for the client. [] if none was at fault."""
    removed: list[str] = []
    for each in error.errors(include_url=False):
        if each["type"] != "extra_forbidden":
            continue
        *above, name = each["loc"]
        holder: Any = body
        for step in above:
            # else it is a union's tag
            if isinstance(step, int) or step in holder:
                holder = holder[step]
        if isinstance(holder, dict) and name in holder:
            del holder[name]
            removed.append(_unknown_path(each["loc"], 100))
    return removed


def above_maximum(param: str, limit: int, value: int) -> APIError:
    """400: an integer past a limit that is a setting and not part of the protocol."""
    return _out_of_bounds("less_than_equal", param, limit, value)


def path_of(location: tuple[int | str, ...]) -> str:
    """('messages', 0, '<array>', 'text') -> 'messages[0].text'. Tags of unions are no part of it."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in TAGS:
            path += f".{step}" if path else step
    return path


def _unknown_path(location: tuple[int | str, ...], length: int) -> str:
    """The path of a field that no type has: its name is the client's own, even if it looks like a tag."""
    *above, name = location
    nested = path_of(tuple(above))
    return _shorten(f"{nested}.{name}" if nested else str(name), length)


def _translate(error: ErrorDetails) -> APIError:
    kind, value = error["type"], error["input"]
    context: dict[str, Any] = error.get("ctx", {})
    param = _shorten(path_of(error["loc"]), 200)
    if kind == REJECTED:
        where = ".".join(part for part in (param, context["field"]) if part)
        return invalid(context["message"], where, context["code"])
    if kind == "missing":
        return invalid(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    if kind == "extra_forbidden":
        param = _unknown_path(error["loc"], 200)
        is_nested = len(error["loc"]) > 1
        message = f"Unknown parameter: '{param}'." if is_nested else f"Unrecognized request argument supplied: {param}"
        return invalid(message, param, "unknown_parameter")
    if kind in EXPECTED:
        return _wrong_type(param, EXPECTED[kind], value)
    if kind in BOUNDS:
        return _out_of_bounds(kind, param, context[BOUNDS[kind][0]], value)
    return _wrong_value(kind, param, value, context)


def _wrong_type(param: str, expected: str, value: Any) -> APIError:
    message = f"Invalid type for '{param}': expected {expected}, but got {KINDS.get(type(value), 'an object')} instead."
    return invalid(message, param, "invalid_type")


def _wrong_value(kind: str, param: str, value: Any, context: Mapping[str, Any]) -> APIError:
    match kind:
        case "literal_error":
            if not isinstance(value, str):  # every value of every Literal in a request is a string
                return _wrong_type(param, "a string", value)
            supported = str(context["expected"]).replace(" or ", " and ")
            return invalid(f"Invalid value: '{_shorten(value, 100)}'. Supported values are: {supported}.", param)
        case "too_long" if isinstance(value, dict):
            most = context["max_length"]
            message = f"Invalid '{param}': too many properties. Expected an object with at most {most} properties."
            return invalid(message, param, "object_above_max_properties")
        case "too_long" | "too_short":
            return _wrong_length(param, "array", len(value), context)
        case "string_too_long" | "string_too_short":
            return _wrong_length(param, "string", len(value), context)
        case "string_pattern_mismatch":
            message = f"Invalid '{param}': string does not match pattern. Expected a string that matches the pattern "
            return invalid(message + f"'{context['pattern']}'.", param)
        case _:
            return invalid(f"Invalid value for '{param}'.", param)


def _wrong_length(param: str, noun: str, length: int, context: Mapping[str, Any]) -> APIError:
    article = "an" if noun == "array" else "a"
    if "max_length" in context:
        most = context["max_length"]
        message = (
            f"Invalid '{param}': {noun} too long. Expected {article} {noun} with maximum length {most}, "
            f"but got {article} {noun} with length {length} instead."
        )
        return invalid(message, param, f"{noun}_above_max_length")
    message = (
        f"Invalid '{param}': empty {noun}. Expected {article} {noun} with minimum length {context['min_length']}, "
        f"but got an empty {noun} instead."
    )
    return invalid(message, param, f"empty_{noun}")


def _out_of_bounds(kind: str, param: str, limit: float, value: float) -> APIError:
    _, words, code, sign = BOUNDS[kind]
    noun = "integer" if isinstance(limit, int) else "decimal"
    allowed = f"{sign} {limit}" if isinstance(limit, int) else f"{sign} {limit:g}"
    message = f"Invalid '{param}': {noun} {words} value. Expected a value {allowed}, but got {value} instead."
    return invalid(message, param, f"{noun}_{code}_value")


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "..."
