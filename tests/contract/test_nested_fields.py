"""Fields below the top level, as today's SDKs, proxies and front ends send them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving.openai.limits import ApiLimits
from tests.contract.tiny import NAME, USER, assert_openai_error, chunks, post, serving

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
HINT = {"type": "ephemeral"}


def chat(**more: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": USER, "max_tokens": 3, **more}


WITHOUT_EFFECT = [
    chat(messages=[{"role": "user", "content": [{"type": "text", "text": "你好", field: HINT}]}])
    for field in ("cache_control", "copilot_cache_control", "prompt_cache_breakpoint")
] + [
    chat(
        messages=[
            *USER,
            {
                "role": "assistant",
                "content": "好",
                "cache_control": HINT,
                "reasoning": "r",
                "reasoning_content": None,
                "reasoning_details": [{"type": "reasoning.text", "text": "r"}],
                "thinking_blocks": [{"type": "thinking", "thinking": "r", "signature": "s"}],
                "provider_specific_fields": {"a": 1},
                "extra_content": {"google": {}},
                "tool_calls": None,
                "function_call": None,
                "audio": None,
            },
            *USER,
        ]
    ),
    chat(moderation={"model": "omni-moderation-latest"}),
    chat(enable_thinking=False, chat_template_kwargs={"enable_thinking": False}, thinking={"type": "disabled"}),
]


@pytest.mark.parametrize("body", WITHOUT_EFFECT)
def test_what_changes_no_answer_is_accepted(body: dict[str, Any], folder: Path) -> None:
    with serving(folder) as app:
        reply = post(app, "/chat/completions", body)
        assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"moderation": {"mode": "block"}}, "moderation.mode"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "guided_choice"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "b"}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "stop_token_ids": [5]}, "stop_token_ids"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "other": 1}]}]},
         "messages[0].content[0].other"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused_by_name(more: dict[str, Any], param: str, folder: Path) -> None:
    with serving(folder) as app:
        error = assert_openai_error(post(app, "/chat/completions", chat(**more)), 400)
        assert error["param"] == param


def test_structured_outputs_are_the_guided_fields(folder: Path) -> None:
    with serving(folder) as app:
        for outputs, check in (
            ({"choice": ["red", "blue"]}, lambda text: text in ("red", "blue")),
            ({"regex": "[ab]{3}"}, lambda text: len(text) == 3 and set(text) <= {"a", "b"}),
            ({"json": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
                       "additionalProperties": False}}, lambda text: isinstance(json.loads(text)["a"], bool)),
        ):  # fmt: skip
            reply = post(app, "/chat/completions", chat(structured_outputs=outputs, max_tokens=60))
            assert check(reply.json()["choices"][0]["message"]["content"]), reply.text


def test_a_token_can_end_an_answer(folder: Path) -> None:
    with serving(folder) as app:
        body = chat(max_tokens=12, temperature=0, logprobs=True, ignore_eos=True)
        whole = post(app, "/chat/completions", body).json()["choices"][0]
        assert whole["finish_reason"] == "length"
        ended = post(app, "/chat/completions", {**body, "stop_token_ids": list(range(3, 60))}).json()["choices"][0]
        assert ended["finish_reason"] == "stop"
        assert whole["message"]["content"].startswith(ended["message"]["content"])
        assert len(ended["message"]["content"]) < len(whole["message"]["content"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_function_ends_with_stop(stream: bool, folder: Path) -> None:
    with serving(folder, family="chatglm3", context=2048) as app:
        named = {"type": "function", "function": {"name": "f"}}
        for choice, reason in ((named, "stop"), ("required", "tool_calls")):
            body = chat(tools=[TOOL], tool_choice=choice, max_tokens=100, stream=stream, parallel_tool_calls=False)
            reply = post(app, "/chat/completions", body)
            if stream:
                found = [chunk["choices"][0]["finish_reason"] for chunk in chunks(reply) if chunk["choices"]][-1]
            else:
                (only,) = reply.json()["choices"]
                assert only["message"]["tool_calls"]
                found = only["finish_reason"]
            assert found == reason


def test_empty_arguments_are_an_empty_object(folder: Path) -> None:
    with serving(folder, family="chatglm3", context=2048) as app:
        history = [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                   {"role": "tool", "tool_call_id": "c1", "content": "1"}]  # fmt: skip
        assert post(app, "/chat/completions", chat(messages=history, tools=[TOOL])).status_code == 200


def test_responses_take_cache_breakpoints(folder: Path) -> None:
    with serving(folder) as app:
        part = {"type": "input_text", "text": "你好", "prompt_cache_breakpoint": {"mode": "explicit"}}
        body = {"model": NAME, "input": [{"role": "user", "content": [part]}], "max_output_tokens": 3}
        assert post(app, "/responses", body).status_code == 200


def test_unknown_fields_can_be_ignored_and_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    unknown = chat(
        made_up=1,
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "x", "a,b\n": 1}, {"type": "text", "text": "y", "c": 2}],
            }
        ],
        tools=[{**TOOL, "d": 3}],
        tool_choice="none",
    )
    with serving(folder) as app:
        assert_openai_error(post(app, "/chat/completions", unknown), 400)
    with serving(folder, limits=ApiLimits(ignores_unknown=True)) as app:
        for _ in range(2):
            reply = post(app, "/chat/completions", unknown)
            assert reply.status_code == 200, reply.text
            named = set(reply.headers["x-chatglm-ignored-fields"].split(", "))
            assert named == {"made_up", "messages[0].content[0].a?b?", "messages[0].content[1].c", "tools[0].d"}
        assert len([r for r in caplog.records if "unknown field" in r.message and "made_up" in r.message]) <= 1
        for known in ({"temperature": 3}, {"audio": {"voice": "x"}}, {"max_tokens": "x"}):
            assert_openai_error(post(app, "/chat/completions", {**unknown, **known}), 400)
        assert "x-chatglm-ignored-fields" not in post(app, "/chat/completions", chat()).headers
