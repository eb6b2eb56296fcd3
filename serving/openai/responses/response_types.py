"""The response object and its events, field by field, for the served document; see serving.openai.response_types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from serving.openai.response_types import EXACT, Count, TokenLogprobEntry, Zero
from serving.openai.responses.request import Status


class OutputText(BaseModel):
    """The text of a message."""

    model_config = EXACT
    type: Literal["output_text"]
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: list[TokenLogprobEntry]
    text: str


class OutputMessage(BaseModel):
    """What the model says."""

    model_config = EXACT
    id: str
    type: Literal["message"]
    status: Status
    content: Annotated[list[OutputText], Field(max_length=1)]
    role: Literal["assistant"]


class OutputCall(BaseModel):
    """A call that the model wants made; `arguments` is JSON text."""

    model_config = EXACT
    id: str
    type: Literal["function_call"]
    status: Status
    arguments: str
    call_id: str
    name: str


OutputItem = OutputMessage | OutputCall


class InputTokensDetails(BaseModel):
    """`cached_tokens`: how many of the prompt did not have to be computed again."""

    model_config = EXACT
    cached_tokens: Count
    cache_write_tokens: Zero


class OutputTokensDetails(BaseModel):
    """0: the model does not reason apart from its answer."""

    model_config = EXACT
    reasoning_tokens: Zero


class ResponseUsage(BaseModel):
    """Token counts; the end token counts as generated."""

    model_config = EXACT
    input_tokens: Count
    input_tokens_details: InputTokensDetails
    output_tokens: Count
    output_tokens_details: OutputTokensDetails
    total_tokens: Count


class ResponseError(BaseModel):
    """Why a stream could not be completed."""

    model_config = EXACT
    code: str
    message: str


class IncompleteDetails(BaseModel):
    """Why the answer ends where it ends."""

    model_config = EXACT
    reason: Literal["max_output_tokens"]


class ReasoningEcho(BaseModel):
    """Both null: there is no reasoning."""

    model_config = EXACT
    effort: None
    summary: None


class Response(BaseModel):
    """The answer, with what was asked for beside it."""

    model_config = EXACT
    id: str
    object: Literal["response"]
    created_at: Count
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    completed_at: Count | None
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: Count | None
    max_tool_calls: Count | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: ReasoningEcho
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: Count
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]


class ResponseStateEvent(BaseModel):
    """The response as it is now: at the beginning and at the end."""

    model_config = EXACT
    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    response: Response
    sequence_number: Count


class OutputItemEvent(BaseModel):
    """An item begins or is complete."""

    model_config = EXACT
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: Count
    item: OutputItem
    sequence_number: Count


class ContentPartEvent(BaseModel):
    """The text of a message begins or is complete."""

    model_config = EXACT
    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: Count
    content_index: Zero
    part: OutputText
    sequence_number: Count


class TextDeltaEvent(BaseModel):
    """More text."""

    model_config = EXACT
    type: Literal["response.output_text.delta"]
    item_id: str
    output_index: Count
    content_index: Zero
    delta: str
    logprobs: list[TokenLogprobEntry]
    sequence_number: Count


class TextDoneEvent(BaseModel):
    """All the text."""

    model_config = EXACT
    type: Literal["response.output_text.done"]
    item_id: str
    output_index: Count
    content_index: Zero
    text: str
    logprobs: list[TokenLogprobEntry]
    sequence_number: Count


class ArgumentsDeltaEvent(BaseModel):
    """More of a call's arguments."""

    model_config = EXACT
    type: Literal["response.function_call_arguments.delta"]
    item_id: str
    output_index: Count
    delta: str
    sequence_number: Count


class ArgumentsDoneEvent(BaseModel):
    """All of a call's arguments."""

    model_config = EXACT
    type: Literal["response.function_call_arguments.done"]
    item_id: str
    output_index: Count
    name: str
    arguments: str
    sequence_number: Count


ResponseEvent = (
    ResponseStateEvent
    | OutputItemEvent
    | ContentPartEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
)
