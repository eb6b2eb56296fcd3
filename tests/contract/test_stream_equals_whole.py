"""A stream and a whole answer of one request agree byte for byte, whatever fields are combined, at every endpoint.

Only log-probabilities are compared as numbers: the second request finds its prompt computed, and rounding differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from tests.contract.tiny import NAME, chunks, post

PREFILL = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hel"}]
CONVERSATIONS = st.sampled_from(
    [
        [{"role": "user", "content": "你好 hello"}],
        [{"role": "system", "content": "Be."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    ]
)
SAMPLING = {
    "temperature": st.sampled_from([0, 0.5, 1.5, 2]),
    "top_p": st.sampled_from([0, 0.5, 1]),
    "top_k": st.sampled_from([-1, 0, 3]),
    "min_p": st.sampled_from([0.0, 0.05]),
    "repetition_penalty": st.sampled_from([0.8, 1.3]),
    "presence_penalty": st.sampled_from([-1, 1.5]),
    "frequency_penalty": st.sampled_from([-0.5, 1]),
    "logit_bias": st.sampled_from([{"300": 5}, {"10": -100, "11": 2.5}]),
    "stop": st.sampled_from(["o", ["fo", "。"], ["\ufffd"], "助理", ["助", "理"], " "]),
    "min_tokens": st.just(1),
    "ignore_eos": st.booleans(),
}
ALWAYS = {"seed": st.integers(0, 99)}
ONE_LENGTH = st.sampled_from(["max_tokens", "max_completion_tokens", "max_length"])
USAGE = st.sampled_from([None, {}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}])
bounded = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def both(app: Starlette, path: str, body: dict[str, Any], options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole answer, and the chunks of the same with the usage chunk checked and taken off."""
    response = post(app, path, body)
    assert response.status_code == 200, response.text
    whole = response.json()
    parts = chunks(post(app, path, {**body, "stream": True, "stream_options": options}))
    for part in parts:
        assert set(part) - {"usage"} == {"id", "object", "created", "model", "system_fingerprint", "choices"}
        assert (part["id"], part["created"]) == (parts[0]["id"], parts[0]["created"])
        assert part["model"] == whole["model"]
        assert part["system_fingerprint"] == whole["system_fingerprint"]
    if not options or not options["include_usage"]:
        assert all("usage" not in part for part in parts)
        return whole, parts
    assert [part["choices"] == [] for part in parts] == [False] * (len(parts) - 1) + [True]
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert parts[-1]["usage"][key] == whole["usage"][key]
    counts = [part["usage"]["completion_tokens"] for part in parts if part["usage"]]
    assert len(counts) == (len(parts) if "continuous_usage_stats" in options else 1)
    assert counts == sorted(counts)
    return whole, parts[:-1]


def assert_same(one: Any, other: Any) -> None:
    """Equal, but for the last digits of floats."""
    if isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, abs=1e-3)
    elif isinstance(one, dict) and isinstance(other, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


def glued(parts: list[dict[str, Any]], fold: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> list[dict[str, Any]]:
    """What a client makes of the chunks; every choice appears in order and ends with its reason, once."""
    seen: list[int] = []
    by_choice: dict[int, list[dict[str, Any]]] = {}
    for part in parts:
        for choice in part["choices"]:
            if choice["index"] not in by_choice:
                seen.append(choice["index"])
            by_choice.setdefault(choice["index"], []).append(choice)
    assert seen == sorted(seen)
    for choices in by_choice.values():
        assert [choice["finish_reason"] is None for choice in choices] == [True] * (len(choices) - 1) + [False]
    return [{"index": index, **fold(choices)} for index, choices in sorted(by_choice.items())]


def chat_choice(choices: list[dict[str, Any]]) -> dict[str, Any]:
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {}
    assert all(choice["delta"].keys() == {"content"} for choice in choices[1:-1])
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    return {
        "content": "".join(choice["delta"].get("content", "") for choice in choices),
        "logprobs": entries,
        "finish_reason": choices[-1]["finish_reason"],
    }


@bounded
@given(
    conversation=CONVERSATIONS,
    sampling=st.fixed_dictionaries(ALWAYS, optional=SAMPLING),
    length=st.tuples(ONE_LENGTH, st.integers(1, 14)),
    shape=st.fixed_dictionaries({}, optional={"n": st.integers(1, 3), "logprobs": st.just(True), "user": st.just("u")}),
    prefill=st.booleans(),
    options=USAGE,
)
def test_chat(
    app: Starlette,
    conversation: Any,
    sampling: dict[str, Any],
    length: tuple[str, int],
    shape: dict[str, Any],
    prefill: bool,
    options: Any,
) -> None:
    body = {"model": NAME, "messages": conversation, **sampling, **shape, length[0]: length[1]}
    if shape.get("logprobs"):
        body["top_logprobs"] = length[1] % 4
    if prefill:
        body |= {"messages": PREFILL, "continue_final_message": True}
    whole, parts = both(app, "/chat/completions", body, options)
    expected = [
        {
            "index": choice["index"],
            "content": choice["message"]["content"],
            "logprobs": choice["logprobs"]["content"] if choice["logprobs"] else [],
            "finish_reason": choice["finish_reason"],
        }
        for choice in whole["choices"]
    ]
    assert_same(glued(parts, chat_choice), expected)


def text_choice(choices: list[dict[str, Any]]) -> dict[str, Any]:
    lists = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {
        "text": "".join(choice["text"] for choice in choices),
        "logprobs": {name: [entry for one in lists for entry in one[name]] for name in names},
        "finish_reason": choices[-1]["finish_reason"],
    }


@bounded
@given(
    prompt=st.sampled_from(["Hello", ["Hello", "你好"], [300, 301], [[300], [301, 302]]]),
    sampling=st.fixed_dictionaries(ALWAYS, optional=SAMPLING),
    length=st.integers(1, 10),
    n=st.integers(1, 3),
    best_of=st.booleans(),
    extra=st.sampled_from([{}, {"echo": True}, {"logprobs": 0}, {"logprobs": 3}]),
    options=USAGE,
)
def test_completions(
    app: Starlette,
    prompt: Any,
    sampling: dict[str, Any],
    length: int,
    n: int,
    best_of: bool,
    extra: dict[str, Any],
    options: Any,
) -> None:
    body = {"model": NAME, "prompt": prompt, **sampling, "max_tokens": length, "n": n, **extra}
    if best_of:
        body["best_of"] = n  # more than n cannot be streamed: the best is known at the end
    whole, parts = both(app, "/completions", body, options)
    nothing: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    expected = [
        {
            "index": choice["index"],
            "text": choice["text"],
            "logprobs": choice["logprobs"] or nothing,
            "finish_reason": choice["finish_reason"],
        }
        for choice in whole["choices"]
    ]
    assert_same(glued(parts, text_choice), expected)


@bounded
@given(
    sampling=st.fixed_dictionaries(ALWAYS, optional=SAMPLING),
    length=st.integers(1, 14),
    extra=st.sampled_from(
        [{}, {"instructions": "Be."}, {"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}]
    ),
)
def test_responses(app: Starlette, sampling: dict[str, Any], length: int, extra: dict[str, Any]) -> None:
    body = {"model": NAME, "input": "你好 hello", **sampling, "max_output_tokens": length, **extra}
    response = post(app, "/responses", body)
    assert response.status_code == 200, response.text
    whole = response.json()
    blocks = post(app, "/responses", {**body, "stream": True}).text.strip().split("\n\n")
    events = [json.loads(block.split("\ndata: ")[1]) for block in blocks]
    last = events[-1]["response"]
    (item,), (expected,) = last["output"], whole["output"]
    assert_same({**item, "id": ""}, {**expected, "id": ""})
    assert (last["status"], last["incomplete_details"]) == (whole["status"], whole["incomplete_details"])
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(event["delta"] for event in deltas) == expected["content"][0]["text"]
    assert_same([entry for event in deltas for entry in event["logprobs"]], expected["content"][0]["logprobs"])
