"""A request -> OpenAI's response object before the answer is in it, and the published types of the object."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from serving.generation.interface import Usage
from serving.openai.common import Count
from serving.openai.logprobs import TokenLogprobEntry
from serving.openai.responses.request import ResponsesRequest, Status
from serving.openai.responses.tools import CustomTool, FunctionTool


class OutputText(TypedDict):
    """The text of a message."""

    type: Literal["output_text"]
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: list[TokenLogprobEntry]
    text: str


class OutputMessage(TypedDict):
    """What the model says."""

    id: str
    type: Literal["message"]
    status: Status
    content: Annotated[list[OutputText], Field(max_length=1)]
    role: Literal["assistant"]


class ReasoningText(TypedDict):
    """The text of a thought."""

    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(TypedDict):
    """What the model thought before it answered."""

    id: str
    type: Literal["reasoning"]
    status: Status
    summary: Annotated[list[Any], Field(max_length=0)]
    content: Annotated[list[ReasoningText], Field(max_length=1)]


class OutputCall(TypedDict):
    """A call that the model wants made; `arguments` is JSON text."""

    id: str
    type: Literal["function_call"]
    status: Status
    arguments: str
    call_id: str
    name: str


class OutputCustomCall(TypedDict):
    """A call of a custom tool that the model wants made; `input` is text."""

    id: str
    type: Literal["custom_tool_call"]
    status: Status
    input: str
    call_id: str
    name: str


OutputItem = OutputMessage | OutputReasoning | OutputCall | OutputCustomCall


class InputTokensDetails(TypedDict):
    """`cached_tokens`: how many of the prompt did not have to be computed again."""

    cached_tokens: Count
    cache_write_tokens: Literal[0]


class OutputTokensDetails(TypedDict):
    """0: the model does not reason apart from its answer."""

    reasoning_tokens: Count


class ResponseUsage(TypedDict):
    """Token counts; the end token counts as generated."""

    input_tokens: Count
    input_tokens_details: InputTokensDetails
    output_tokens: Count
    output_tokens_details: OutputTokensDetails
    total_tokens: Count


class ResponseError(TypedDict):
    """Why a stream could not be completed."""

    code: str
    message: str


class IncompleteDetails(TypedDict):
    """Why the answer ends where it ends."""

    reason: Literal["max_output_tokens"]


class ReasoningEcho(TypedDict):
    """Both null: there is no reasoning."""

    effort: None
    summary: None


class Response(TypedDict):
    """The answer, with what was asked for beside it."""

    id: str
    object: Literal["response"]
    created_at: Count
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    completed_at: Count | None
    error: ResponseError | None
    frequency_penalty: float
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: Count | None
    max_tool_calls: Count | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    presence_penalty: float
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


def fresh_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def unfinished_response(body: ResponsesRequest) -> Response:
    """The response before anything is in it: what was asked for, with the defaults filled in."""
    choice = body.tool_choice
    return {
        "id": fresh_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "frequency_penalty": body.frequency_penalty,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "presence_penalty": body.presence_penalty,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}, **(body.text.model_dump(exclude_none=True) if body.text else {})},
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [_tool(tool) for tool in body.tools],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }


def _tool(tool: FunctionTool | CustomTool) -> dict[str, Any]:
    if isinstance(tool, CustomTool):
        return tool.model_dump(exclude_none=True)
    rest = {"description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
    return {**rest, "type": tool.type, "name": tool.name}


def to_response_usage(usage: Usage) -> ResponseUsage:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
