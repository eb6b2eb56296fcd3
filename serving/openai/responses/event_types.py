"""The published types of the events of a response's stream."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypeAliasType, TypedDict

from serving.openai.common import Count
from serving.openai.logprobs import TokenLogprobEntry
from serving.openai.responses.response import OutputItem, OutputText, Response

StateName = Literal[
    "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
]
PartName = Literal["response.content_part.added", "response.content_part.done"]
ItemName = Literal["response.output_item.added", "response.output_item.done"]


class ResponseStateEvent(TypedDict):
    """The response as it is now: at the beginning and at the end."""

    type: StateName
    response: Response
    sequence_number: Count


class OutputItemEvent(TypedDict):
    """An item begins or is complete."""

    type: ItemName
    output_index: Count
    item: OutputItem
    sequence_number: Count


class InItem(TypedDict):
    """Which item of the output an event belongs to."""

    item_id: str
    output_index: Count


class InText(InItem):
    """And which part of its content."""

    content_index: Literal[0]


class ContentPartEvent(InText):
    """The text of a message begins or is complete."""

    type: PartName
    part: OutputText
    sequence_number: Count


class TextDeltaEvent(InText):
    """More text."""

    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[TokenLogprobEntry]
    sequence_number: Count


class TextDoneEvent(InText):
    """All the text."""

    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[TokenLogprobEntry]
    sequence_number: Count


class ReasoningDeltaEvent(InText):
    """More of a thought."""

    type: Literal["response.reasoning_text.delta"]
    delta: str
    sequence_number: Count


class ReasoningDoneEvent(InText):
    """All of a thought."""

    type: Literal["response.reasoning_text.done"]
    text: str
    sequence_number: Count


class ArgumentsDeltaEvent(InItem):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str
    sequence_number: Count


class ArgumentsDoneEvent(InItem):
    """All of a call's arguments."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str
    sequence_number: Count


class InputDeltaEvent(InItem):
    """More of the input of a custom tool."""

    type: Literal["response.custom_tool_call_input.delta"]
    delta: str
    sequence_number: Count


class InputDoneEvent(InItem):
    """All of the input."""

    type: Literal["response.custom_tool_call_input.done"]
    input: str
    sequence_number: Count


ResponseEvent = TypeAliasType(
    "ResponseEvent",
    ResponseStateEvent
    | OutputItemEvent
    | ContentPartEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ReasoningDeltaEvent
    | ReasoningDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
    | InputDeltaEvent
    | InputDoneEvent,
)
