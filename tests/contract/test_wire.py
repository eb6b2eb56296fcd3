"""Lines of the wire notes that no other test holds: what clients trip over, at every endpoint that has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette

from tests.contract.tiny import NAME, USER, assert_openai_error, post, send, serving

CHAT: dict[str, Any] = {"model": NAME, "messages": USER, "max_tokens": 8, "seed": 5}
STREAMS = {
    "/chat/completions": CHAT,
    "/completions": {"model": NAME, "prompt": "Hello", "max_tokens": 8, "seed": 5},
    "/responses": {"model": NAME, "input": "Hello", "max_output_tokens": 8, "seed": 5},
}
BODIES = {
    **STREAMS,
    "/embeddings": {"model": NAME, "input": "Hello"},
    "/tokenize": {"model": NAME, "prompt": "Hello"},
    "/detokenize": {"model": NAME, "tokens": [5]},
    "/chat/completions/input_tokens": CHAT,
    "/responses/input_tokens": {"model": NAME, "input": "Hello"},
}


@pytest.mark.parametrize("path", STREAMS)
def test_separators_at_which_clients_split_lines_are_escaped_in_a_stream(folder: Path, path: str) -> None:
    """httpx and requests take U+2028, U+2029 and U+0085 for the end of a line."""
    length = "max_output_tokens" if path == "/responses" else "max_tokens"
    with serving(folder, script="a\u2028b\u2029c\x85d") as app:
        response = post(app, path, {**STREAMS[path], "stream": True, length: 30})
    assert {"\\u2028", "\\u2029", "\\u0085"} <= set(_escapes(response.text))
    assert not {"\u2028", "\u2029", "\x85"} & set(response.text)
    for line in response.iter_lines():
        assert line == "" or line.startswith(("data: {", "data: [DONE]", "event: "))


def _escapes(text: str) -> list[str]:
    return [text[i : i + 6] for i in range(len(text)) if text.startswith("\\u", i)]


@pytest.mark.parametrize("path", STREAMS)
def test_a_streams_headers_are_those_of_an_event_stream_with_a_request_id(app: Starlette, path: str) -> None:
    headers = {"x-request-id": "mine-1"}
    response = send(app, "POST", path, json={**STREAMS[path], "stream": True}, headers=headers)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"] == "mine-1"
    assert response.headers["openai-processing-ms"].isdigit()
    assert not any(line.startswith(("id:", "retry:")) for line in response.text.splitlines())
    assert response.text.endswith("\n\n")


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_is_json_with_a_request_id(app: Starlette, path: str) -> None:
    response = post(app, path, BODIES[path])
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("path", BODIES)
def test_every_endpoint_fails_in_the_same_shape(app: Starlette, path: str) -> None:
    body = BODIES[path]
    missing = {key: value for key, value in body.items() if key != "model"}
    assert assert_openai_error(post(app, path, missing), 400)["code"] == "missing_required_parameter"
    assert assert_openai_error(post(app, path, {**body, "model": "nobody"}), 404)["code"] == "model_not_found"
    assert assert_openai_error(post(app, path, {**body, "x": 1}), 400)["code"] == "unknown_parameter"
    assert assert_openai_error(send(app, "POST", path, content=b"{"), 400)["code"] == "invalid_json"
    assert assert_openai_error(send(app, "GET", path), 405)["code"] == "method_not_supported"
    assert assert_openai_error(send(app, "DELETE", path + "/nothing"), 404)["code"] == "unknown_url"
    text = {"content-type": "text/plain"}
    assert assert_openai_error(send(app, "POST", path, content=b"{}", headers=text), 400)["code"] == (
        "unsupported_content_type"
    )


def test_a_failed_request_is_json_even_if_a_stream_was_asked_for(app: Starlette) -> None:
    for path, body in STREAMS.items():
        error = assert_openai_error(post(app, path, {**body, "stream": True, "temperature": 9}), 400)
        assert error["param"] == "temperature"


def test_the_loop_of_2023_reads_every_line(app: Starlette) -> None:
    """`json.loads(line[6:])["choices"][0]["delta"]` must hold for every line but the last, and no content is None."""
    response = post(app, "/chat/completions", {**CHAT, "stream": True})
    lines = [line for line in response.text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-1]]
    assert all(delta.get("content", "") is not None for delta in deltas)


def test_a_conversation_may_end_with_the_assistant(app: Starlette) -> None:
    """The server of 2023 refused it."""
    history = [*USER, {"role": "assistant", "content": "Well"}]
    begun = {**CHAT, "messages": history, "continue_final_message": True}
    for body in (begun, {**begun, "add_generation_prompt": False}):
        assert post(app, "/chat/completions", body).status_code == 200


def test_reading_a_model_needs_no_body_and_ignores_a_query(app: Starlette) -> None:
    response: httpx2.Response = send(app, "GET", f"/models/{NAME}?beta=true")
    assert response.json()["id"] == NAME
