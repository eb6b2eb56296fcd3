"""Exceptions of generation and engine, refusals of endpoints -> `APIError`s with OpenAI's sentences and codes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from serving.engine.outputs import EngineStopped, NotFinite, OutOfMemory, RequestTooLarge, UnknownToken
from serving.generation.interface import PromptError
from serving.generation.pipeline import ContextOverflow
from serving.http.errors import RETRY_SECONDS, SERVER_ERROR, APIError, invalid, shutting_down

ABILITIES = {
    "chat": "generating text", "embeddings": "embeddings", "rerank": "scoring pairs of texts (it is no reranker)"
}  # fmt: skip
RETRY_LATER = {"retry-after": str(RETRY_SECONDS)}
DO_NOT_RETRY = {"x-should-retry": "false"}  # it would fail again


def model_not_found(name: str, known: Sequence[str]) -> APIError:
    """404: no model of this name is served."""
    shown = name if len(name) <= 100 else name[:100] + "..."
    message = f"The model `{shown}` does not exist or you do not have access to it. Served here: {', '.join(known)}."
    return APIError(404, message, param="model", code="model_not_found")


def wrong_ability(name: str, ability: str, abilities: Collection[str]) -> APIError:
    """400: the model is of another kind."""
    message = f"The model `{name}` does not support {ABILITIES[ability]}; it is for {', '.join(sorted(abilities))}."
    return APIError(400, message, param="model", code="unsupported_model")


def model_loading(name: str) -> APIError:
    """503: the model is not in memory yet."""
    message = f"The model `{name}` is still loading. Please retry shortly."
    return APIError(503, message, SERVER_ERROR, None, "model_loading", RETRY_LATER)


def model_load_failed(name: str) -> APIError:
    """503: loading has ended with an error, which is in the log only."""
    message = f"The model `{name}` could not be loaded. See the server's log."
    return APIError(503, message, SERVER_ERROR, None, "model_load_failed", DO_NOT_RETRY)


def no_memory_now(name: str, needed: int, free: int) -> APIError:
    """503: models that answer requests have the memory that this one needs."""
    message = (
        f"The model `{name}` needs {needed / 2**30:.2f} GiB of memory; {free / 2**30:.2f} GiB can be had while the "
        "other models answer requests. Please retry later."
    )
    return APIError(503, message, SERVER_ERROR, "model", "model_memory", RETRY_LATER)


def no_memory_ever(name: str, needed: int, total: int) -> APIError:
    """400: the model is larger than all the memory there is for models."""
    message = (
        f"The model `{name}` needs {needed / 2**30:.2f} GiB of memory, and this server has {total / 2**30:.2f} GiB for "
        "models: it can never be loaded here."
    )
    return APIError(400, message, param="model", code="model_too_large")


def deadline_passed(status: int, seconds: float) -> APIError:
    """408 for the client's own deadline, 504 for the server's; only the second is the server's fault."""
    message = f"The request was not answered within {seconds:g} seconds."
    code = "request_timeout" if status == 408 else "server_timeout"
    return APIError(status, message, SERVER_ERROR, None, code, DO_NOT_RETRY)


def context_overflow(error: ContextOverflow, is_default: bool, param: str) -> APIError:
    """400: prompt and answer do not fit. `is_default`: the client named no length, so the prompt alone is at fault.

    param: the request's field that holds the prompt.
    """
    message = error.sentence(param)
    if is_default:
        message = (
            f"This model's maximum context length is {error.max_positions} tokens. However, your {param} "
            f"resulted in {error.at_least}{error.num_prompt_tokens} tokens. "
            f"Please reduce the length of the {param}."
        )
    return APIError(400, message, param=param, code="context_length_exceeded")


def from_exception(error: Exception) -> APIError:
    """The failure as a client sees it. An exception that is not known to be meant for clients becomes a bare 500."""
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
        case UnknownToken():
            return invalid(f"This model has no token {error.token_id}.", None)
        case EngineStopped():
            return shutting_down()
        case OutOfMemory():
            message = "The server ran out of device memory while it processed your request. Please reduce its size."
            return APIError(500, message, SERVER_ERROR, None, "out_of_memory", DO_NOT_RETRY)
        case NotFinite():
            message = (
                "The model produced numbers that are not finite (NaN or infinity) for this request, so it has no "
                "answer. Other requests are not affected."
            )
            return APIError(500, message, SERVER_ERROR, None, "numbers_not_finite", DO_NOT_RETRY)
        case _:
            message = "The server had an error while processing your request."
            return APIError(500, message, SERVER_ERROR, None, "server_error")
