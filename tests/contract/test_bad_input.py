"""No body, path or method of a client gives anything but an answer in OpenAI's shape."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from serving.http.json_body import BodyLimits
from serving.openai.chat.request import ACCEPTED_WITHOUT_EFFECT, ChatRequest
from serving.openai.common import REFUSED
from serving.openai.completions.request import CompletionRequest
from serving.openai.limits import ApiLimits
from serving.openai.router import create_app
from serving.registry import ModelRegistry, ServedModel
from tests.contract.tiny import NAME, USER, assert_openai_error, post, send, serving

CHAT: dict[str, Any] = {"model": NAME, "messages": USER, "max_tokens": 2}
RAW_BODIES = {
    "nothing": b"",
    "half an object": b'{"model":',
    "an array": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "not UTF-8": b'{"model":"\xff"}',
    "UTF-16": '{"model":"x"}'.encode("utf-16"),
    "NaN": b'{"model":"m","temperature":NaN}',
    "Infinity": b'{"model":"m","temperature":-Infinity}',
    "1e999": b'{"model":"m","temperature":1e999}',
    "an endless integer": b'{"model":"m","seed":' + b"9" * 10_000 + b"}",
    "a lone surrogate": b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}',
    "a key twice": b'{"model":"m","model":"n"}',
    "deep arrays": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "unclosed deep arrays": b"[" * 1_000_000,
    "many quotes": b'"\\"' * 500_000,
    "an unclosed string of quotes": b'["' + b'\\"' * 500_000,
    "a NUL": b'{"model":"m\x00"}',
}


@pytest.mark.timeout(60)  # what is quadratic in a megabyte takes far longer
@pytest.mark.parametrize("body", RAW_BODIES.values(), ids=RAW_BODIES.keys())
def test_a_body_that_is_no_proper_json_object_is_a_400_at_once(app: Starlette, body: bytes) -> None:
    response = send(app, "POST", "/chat/completions", content=body, headers={"content-type": "application/json"})
    assert assert_openai_error(response, 400)["code"] == "invalid_json"


def test_brackets_inside_strings_are_not_depth(app: Starlette) -> None:
    deep = {**CHAT, "messages": [{"role": "user", "content": '[{"\\' * 20}]}
    assert post(app, "/chat/completions", deep).status_code == 200


def test_a_large_body_is_a_413_and_the_server_goes_on(app: Starlette) -> None:
    huge = {**CHAT, "messages": [{"role": "user", "content": "x" * 10_000_000}]}
    assert assert_openai_error(post(app, "/chat/completions", huge), 413)["code"] == "request_too_large"
    assert post(app, "/chat/completions", CHAT).status_code == 200


def test_a_long_prompt_below_the_limit_is_told_its_length(app: Starlette) -> None:
    long = {"model": NAME, "messages": [{"role": "user", "content": "hello " * 60_000}]}
    error = assert_openai_error(post(app, "/chat/completions", long), 400)
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 256 tokens. However, your messages resulted in" in error["message"]


def test_a_form_is_told_to_be_json(app: Starlette) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = send(app, "POST", "/chat/completions", content=json.dumps(CHAT).encode(), headers=headers)
    assert "application/json" in assert_openai_error(response, 400)["message"]


def test_json_without_a_content_type_is_read(app: Starlette) -> None:
    assert send(app, "POST", "/chat/completions", content=json.dumps(CHAT).encode()).status_code == 200


def test_a_compressed_body_is_a_415(app: Starlette) -> None:
    response = send(app, "POST", "/chat/completions", content=b"x", headers={"content-encoding": "gzip"})
    assert_openai_error(response, 415)


FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
    ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
    ({"top_p": 1.5}, "top_p", "decimal_above_max_value"),
    ({"top_k": -2}, "top_k", "integer_below_min_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value"),
    ({"n": 0}, "n", "integer_below_min_value"),
    ({"n": 1.0}, "n", "invalid_type"),
    ({"n": 129}, "n", "integer_above_max_value"),
    ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
    ({"max_tokens": 10**30}, "messages", "context_length_exceeded"),
    ({"max_completion_tokens": 5}, "max_tokens", "invalid_value"),
    ({"min_tokens": 3}, "min_tokens", "invalid_value"),
    ({"seed": 2**64}, "seed", "integer_above_max_value"),
    ({"stop": ["a"] * 17}, "stop", "array_above_max_length"),
    ({"stop": 1}, "stop", "invalid_type"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", "decimal_above_max_value"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
    ({"logprobs": 1}, "logprobs", "invalid_type"),
    ({"top_logprobs": 1}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
    ({"model": None}, "model", "invalid_type"),
    ({"model": ""}, "model", "empty_string"),
    ({"foo": 1}, "foo", "unknown_parameter"),
    ({"<string>": 1}, "<string>", "unknown_parameter"),
    ({"functions": []}, "functions", "empty_array"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_value"),
    ({"modalities": ["text", "audio"]}, "modalities[1]", "invalid_value"),
    ({"user": 5}, "user", "invalid_type"),
    ({"continue_final_message": True}, "continue_final_message", "invalid_value"),
    ({"messages": None}, "messages", "invalid_type"),
    ({"messages": []}, "messages", "empty_array"),
    ({"messages": "hi"}, "messages", "invalid_type"),
    ({"messages": [None]}, "messages[0]", "invalid_type"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty_array"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", "unknown_parameter"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "invalid_value"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        "messages[0].content[0].text",
        "invalid_type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0]",
        "unsupported_value",
    ),
]


@pytest.mark.parametrize(("change", "param", "code"), FIELDS, ids=[json.dumps(row[0])[:60] for row in FIELDS])
def test_a_bad_field_is_named(app: Starlette, change: dict[str, Any], param: str, code: str) -> None:
    error = assert_openai_error(post(app, "/chat/completions", {**CHAT, **change}), 400)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_field_is_named(app: Starlette, field: str) -> None:
    body = {key: value for key, value in CHAT.items() if key != field}
    error = assert_openai_error(post(app, "/chat/completions", body), 400)
    assert error["message"] == f"Missing required parameter: '{field}'."
    assert (error["param"], error["code"]) == (field, "missing_required_parameter")


def test_the_sentences_are_openais(app: Starlette) -> None:
    def message(change: dict[str, Any]) -> str:
        return str(post(app, "/chat/completions", {**CHAT, **change}).json()["error"]["message"])

    assert message({"temperature": "x"}) == (
        "Invalid type for 'temperature': expected a number, but got a string instead."
    )
    assert message({"top_p": 3}) == (
        "Invalid 'top_p': decimal above maximum value. Expected a value <= 1, but got 3 instead."
    )
    assert message({"foo": 1}) == "Unrecognized request argument supplied: foo"
    assert message({"max_tokens": 1200}).startswith("This model's maximum context length is 256 tokens. However, you ")
    assert "Image and audio input are not supported" in message(
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}
    )


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"max_tokens": 300}, "prompt"),
    ],
)
def test_a_bad_completion_field_is_named(app: Starlette, change: dict[str, Any], param: str) -> None:
    response = post(app, "/completions", {"model": NAME, "prompt": "x", **change})
    assert assert_openai_error(response, 400)["param"] == param


def test_unknown_paths_methods_and_models_are_told_as_openai_tells_them(app: Starlette) -> None:
    unknown = assert_openai_error(send(app, "POST", "/no/such"), 404)
    assert unknown["message"].startswith("Unknown request URL: POST /no/such.")
    assert "Did you mean" not in unknown["message"]
    for path in ("/v1/v1/chat/completions", "/v1//chat/completions", "/v1/v1/v1//chat/completions"):
        doubled = assert_openai_error(send(app, "POST", path), 404)
        assert doubled["message"].endswith(" Did you mean '/v1/chat/completions'?")
    wrong = send(app, "GET", "/chat/completions")
    assert_openai_error(wrong, 405)
    assert wrong.headers["allow"] == "POST"
    error = assert_openai_error(post(app, "/chat/completions", {**CHAT, "model": "gpt-5"}), 404)
    assert error["message"] == (
        "The model `gpt-5` does not exist or you do not have access to it. "
        "Served here: chatglm2-6b, chatglm, gpt-3.5-turbo."
    )
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert_openai_error(send(app, "GET", "/models/gpt-5"), 404)


def test_a_model_that_loads_or_failed_is_a_503() -> None:
    served = ServedModel(NAME)
    app = create_app(ModelRegistry([served]))
    response = post(app, "/chat/completions", CHAT)
    assert assert_openai_error(response, 503)["code"] == "model_loading"
    assert response.headers["retry-after"]
    served.error = "no such file: /secret/place"
    response = post(app, "/chat/completions", CHAT)
    assert assert_openai_error(response, 503)["code"] == "model_load_failed"
    assert "secret" not in response.text
    assert response.headers["x-should-retry"] == "false"


def test_the_size_and_depth_of_a_body_are_settings() -> None:
    app = create_app(ModelRegistry([ServedModel(NAME)]), ApiLimits(BodyLimits(max_bytes=200, max_depth=3)))
    assert_openai_error(post(app, "/chat/completions", {**CHAT, "user": "x" * 200}), 413)
    assert_openai_error(post(app, "/chat/completions", {"user": [[[[]]]]}), 400)


def test_the_number_of_answers_is_a_setting(folder: Path) -> None:
    with serving(folder, limits=ApiLimits(max_n=2)) as app:
        assert post(app, "/chat/completions", {**CHAT, "n": 2}).status_code == 200
        error = assert_openai_error(post(app, "/chat/completions", {**CHAT, "n": 3}), 400)
        assert (error["param"], error["code"]) == ("n", "integer_above_max_value")


@pytest.mark.parametrize("given_id", ["abc-123", "x" * 128])
def test_a_sane_request_id_comes_back(app: Starlette, given_id: str) -> None:
    response = send(app, "GET", "/models", headers={"x-request-id": given_id})
    assert response.headers["x-request-id"] == given_id
    assert response.headers["openai-processing-ms"].isdigit()


@pytest.mark.parametrize("given_id", ["", "a b", "x" * 129, "\x7f"])
def test_any_other_request_id_is_replaced(app: Starlette, given_id: str) -> None:
    response = send(app, "GET", "/nowhere", headers={"x-request-id": given_id})
    assert response.headers["x-request-id"].startswith("req_")


def test_every_field_without_effect_is_a_field_and_no_refused_one_is() -> None:
    assert ChatRequest.model_fields.keys() >= ACCEPTED_WITHOUT_EFFECT.keys()
    for request in (ChatRequest, CompletionRequest):
        assert not request.model_fields.keys() & REFUSED.keys()


names = st.sampled_from([*ChatRequest.model_fields, *CompletionRequest.model_fields, *REFUSED, "x", ""])
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9)
)
roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "robot"])
keys = st.sampled_from(
    ["role", "content", "type", "text", "name", "function", "tool_calls", "id", "1", "include_usage"]
)
trees = st.recursive(
    leaves | roles, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": trees | st.text(max_size=9)}), min_size=1, max_size=3
)
sane = {"model": st.just(NAME), "max_tokens": st.just(2)}
bodies = st.one_of(
    st.dictionaries(names, trees, max_size=6),
    st.builds(
        lambda fixed, extra: {**fixed, **extra},
        st.fixed_dictionaries({**sane, "messages": messages, "prompt": trees}),
        st.dictionaries(names, trees, max_size=2),
    ),
    st.builds(
        lambda fixed, extra: {**fixed, **extra},
        st.fixed_dictionaries({**sane, "messages": messages}),
        st.dictionaries(names, trees, max_size=2),
    ),
).map(lambda body: json.dumps(body).encode())
paths = st.sampled_from(
    ["/chat/completions", "/completions", "/tokenize", "/detokenize", "/chat/completions/input_tokens", "/models"]
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(paths, bodies | st.binary(max_size=40))
def test_no_body_at_all_gives_a_5xx(app: Starlette, path: str, body: bytes) -> None:
    response = send(app, "POST", path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in {200, 400, 404, 405, 413, 415}
    if response.status_code != 200:
        assert_openai_error(response)


def test_hundreds_of_thousands_of_wrong_items_cost_no_more_than_one(app: Starlette) -> None:
    """Each was an error object of its own: 5 s of CPU for a body of 2 MB. Counted in time of the process."""
    wrong = {
        "/completions": {"model": NAME, "prompt": [1.5] * 400_000},
        "/detokenize": {"model": NAME, "tokens": [1.5] * 400_000},
        "/chat/completions": {"model": NAME, "messages": [""] * 400_000},
        "/responses": {"model": NAME, "input": [""] * 400_000},
    }
    for path, body in wrong.items():
        content = json.dumps(body).encode()
        before = time.process_time()
        response = send(app, "POST", path, content=content, headers={"content-type": "application/json"})
        assert time.process_time() - before < 1.5, path
        assert "[0]" in assert_openai_error(response, 400)["param"]
