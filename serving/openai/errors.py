"""Exceptions of generation and engine, refusals of endpoints -> `APIError`s with OpenAI's sentences and codes."""

from __future__ import annotations

from serving.engine.interface import EngineStopped, NotFinite, OutOfMemory, RequestTooLarge
from serving.generation.interface import PromptError
from serving.generation.pipeline import ContextOverflow
from serving.http.errors import RETRY_SECONDS, SERVER_ERROR, APIError, invalid, shutting_down


def model_not_found(name: str) -> APIError:
    """404: no model of this name is served."""
    shown = name if len(name) <= 100 else name[:100] + "..."
    message = f"The model `{shown}` does not exist or you do not have access to it."
    return APIError(404, message, param="model", code="model_not_found")


def model_loading() -> APIError:
    """503: the model is not in memory yet."""
    return APIError(
        503, "The model is still loading. Please retry shortly.", SERVER_ERROR, None, "model_loading",
        {"retry-after": str(RETRY_SECONDS)},
    )  # fmt: skip


def model_load_failed() -> APIError:
    """503: the model will not come; a person has to look."""
    message = "The model could not be loaded. See the server's log."
    return APIError(503, message, SERVER_ERROR, None, "model_load_failed", {"x-should-retry": "false"})


def internal_error() -> APIError:
    """500: a fault of ours; the details are in the log only."""
    return APIError(500, "The server had an error while processing your request.", SERVER_ERROR, None, "server_error")


def not_finite() -> APIError:
    """500: the network gave NaN or infinity for this request; it would do so again."""
    message = (
        "The model produced numbers that are not finite (NaN or infinity) for this request, so it has no answer. "
        "Other requests are not affected."
    )
    return APIError(500, message, SERVER_ERROR, None, "numbers_not_finite", {"x-should-retry": "false"})


def deadline_passed(status: int, seconds: float) -> APIError:
    """408 for the client's own deadline, 504 for the server's. Another try would only cost the same again."""
    message = f"The request was not answered within {seconds:g} seconds."
    return APIError(status, message, SERVER_ERROR, None, "request_timeout", {"x-should-retry": "false"})


def out_of_memory() -> APIError:
    """500: the device has no memory for this request; it would have none for its repetition."""
    message = "The server ran out of device memory while it processed your request. Please reduce its size."
    return APIError(500, message, SERVER_ERROR, None, "out_of_memory", {"x-should-retry": "false"})


def context_overflow(error: ContextOverflow, is_default: bool) -> APIError:
    """400: prompt and answer do not fit. `is_default`: the client named no length, so the prompt alone is at fault."""
    where = error.param
    limit, prompt, answer = error.max_positions, error.num_prompt_tokens, error.max_tokens
    start = f"This model's maximum context length is {limit} tokens. However, "
    if is_default:
        rest = f"your {where} resulted in {prompt} tokens. Please reduce the length of the {where}."
    else:
        rest = (
            f"you requested {prompt + answer} tokens ({prompt} in the {where}, {answer} in the completion). "
            f"Please reduce the length of the {where} or completion."
        )
    return APIError(400, start + rest, param=where, code="context_length_exceeded")


def from_exception(error: Exception) -> APIError:
    """What a client is told of any exception. Whatever is not known to be meant for clients stays inside."""
    match error:
        case APIError():
            return error
        case PromptError():
            return invalid(error.message, error.param)
        case RequestTooLarge():
            message = (
                f"The request needs {error.num_needed} tokens of cache, and this server has {error.num_tokens}. "
                "Please reduce the length of the prompt or of the completion."
            )
            return APIError(400, message, code="context_length_exceeded")
        case EngineStopped():
            return shutting_down()
        case OutOfMemory():
            return out_of_memory()
        case NotFinite():
            return not_finite()
        case _:
            return internal_error()
