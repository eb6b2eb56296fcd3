"""Conversations that are too long, and answers that were begun: nothing is lost in silence, not even a space."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette

from serving.generation.history import drop_oldest
from serving.generation.interface import Conversation, Message, Role
from serving.openai.start_generation import DROPPED_ROUNDS_HEADER
from serving.settings import Settings
from tests.contract.tiny import CONTEXT, NAME, assert_openai_error, chunks, in_front_of, post, serving
from tests.original_glm import SMALL, random_weights, write_checkpoint
from tests.own_store import SETTINGS, imported_and_started

ROLES: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
ANSWER = {"model": NAME, "temperature": 0, "max_tokens": 20}


@pytest.fixture(scope="module")
def dropping(folder: Path) -> Iterator[Starlette]:
    with serving(folder, drops_oldest_rounds=True) as application:
        yield application


@pytest.fixture(scope="module")
def dropping3(folder: Path) -> Iterator[Starlette]:
    """ChatGLM3's format, which has tool messages."""
    with serving(folder, "chatglm3", drops_oldest_rounds=True) as application:
        yield application


def long_talk(num_rounds: int) -> list[dict[str, str]]:
    """About 60 tokens a round; the context has 256."""
    rounds = [
        {"role": role, "content": f"{number} 你好 hello world, how are you today?"}
        for number in range(num_rounds)
        for role in ("user", "assistant")
    ]
    return [{"role": "system", "content": "Be short."}, *rounds, {"role": "user", "content": "你好 hello"}]


def num_prompt_tokens(app: Starlette, messages: list[Any]) -> int:
    count: int = post(app, "/tokenize", {"model": NAME, "messages": messages}).json()["count"]
    return count


def test_a_conversation_that_is_too_long_is_refused_unless_the_operator_chose_otherwise(app: Starlette) -> None:
    messages = long_talk(8)
    response = post(app, "/chat/completions", {**ANSWER, "messages": messages})
    error = assert_openai_error(response, 400)
    count = num_prompt_tokens(app, messages)
    assert error["code"] == "context_length_exceeded"
    assert f"{CONTEXT} tokens" in error["message"]
    assert f"({count} in the messages, 20 in the completion)" in error["message"]
    assert DROPPED_ROUNDS_HEADER not in response.headers


@pytest.mark.parametrize("stream", [False, True])
def test_the_oldest_rounds_are_dropped_and_the_reply_says_how_many(dropping: Starlette, stream: bool) -> None:
    messages = long_talk(8)
    response = post(dropping, "/chat/completions", {**ANSWER, "messages": messages, "stream": stream})
    assert response.status_code == 200, response.text
    dropped = int(response.headers[DROPPED_ROUNDS_HEADER])
    kept = [messages[0], *messages[1 + 2 * dropped :]]
    one_more = [messages[0], *messages[1 + 2 * (dropped - 1) :]]
    assert num_prompt_tokens(dropping, kept) + 20 <= CONTEXT < num_prompt_tokens(dropping, one_more) + 20
    short = post(dropping, "/chat/completions", {**ANSWER, "messages": kept})
    assert DROPPED_ROUNDS_HEADER not in short.headers
    if stream:
        answer = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks(response))
    else:
        answer = response.json()["choices"][0]["message"]["content"]
    assert answer == short.json()["choices"][0]["message"]["content"]


def test_a_default_length_gets_a_quarter_of_the_context(dropping: Starlette) -> None:
    response = post(dropping, "/chat/completions", {"model": NAME, "messages": long_talk(8), "seed": 1})
    assert int(response.headers[DROPPED_ROUNDS_HEADER]) > 0
    assert response.json()["usage"]["prompt_tokens"] <= CONTEXT - CONTEXT // 4


def test_a_last_question_that_is_too_long_alone_is_refused_all_the_same(dropping: Starlette) -> None:
    messages = [*long_talk(2)[:-1], {"role": "user", "content": "hello " * 300}]
    response = post(dropping, "/chat/completions", {**ANSWER, "messages": messages})
    assert assert_openai_error(response, 400)["code"] == "context_length_exceeded"
    assert DROPPED_ROUNDS_HEADER not in response.headers


def test_a_round_with_tools_goes_as_a_whole(dropping3: Starlette) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    with_tool = [
        {"role": "user", "content": "天气 " * 40},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny. " * 8},
    ]
    last = {"role": "user", "content": "你好 hello"}
    response = post(dropping3, "/chat/completions", {**ANSWER, "messages": [*with_tool, last]})
    assert response.headers[DROPPED_ROUNDS_HEADER] == "1"
    assert response.json()["usage"]["prompt_tokens"] == num_prompt_tokens(dropping3, [last])


def test_the_operators_setting_reaches_the_model(tmp_path: Path) -> None:
    settings = Settings.from_environment({"CHATGLM_DROP_OLDEST_ROUNDS": "true"})
    small = SETTINGS.model_copy(update={"drop_oldest_rounds": settings.drop_oldest_rounds})
    write_checkpoint(tmp_path / "source", SMALL, random_weights(SMALL, 1))
    model = imported_and_started(tmp_path, "chatglm2", tmp_path / "source", {}, small)
    with in_front_of(model) as app:
        response = post(app, "/chat/completions", {**ANSWER, "messages": long_talk(8)})
    assert int(response.headers[DROPPED_ROUNDS_HEADER]) > 0


def talk(letters: str) -> Conversation:
    return Conversation(tuple(Message(ROLES[letter], str(i)) for i, letter in enumerate(letters)))


@pytest.mark.parametrize(
    ("letters", "limit", "kept", "dropped"),
    [
        ("suauau", 4, "0345", 1),
        ("suauau", 3, "05", 2),
        ("uatau", 4, "4", 1),
        ("uauatau", 5, "23456", 1),
        ("auau", 3, "123", 1),
        ("uuauu", 4, "34", 1),
        ("uasuau", 4, "2345", 1),
        ("uasuau", 3, "25", 2),
    ],
)
def test_whole_rounds_go_and_system_messages_stay(letters: str, limit: int, kept: str, dropped: int) -> None:
    found = drop_oldest(talk(letters), lambda some: len(some.messages) <= limit)
    assert found is not None
    assert ("".join(message.content for message in found[0].messages), found[1]) == (kept, dropped)


@given(st.lists(st.sampled_from(["u", "ua", "uta", "uatata"]), min_size=1, max_size=30), st.integers(0, 60))
def test_no_round_more_than_needed_is_dropped(rounds: list[str], limit: int) -> None:
    conversation = talk("s" + "a".join([*rounds, "u"]))
    found = drop_oldest(conversation, lambda some: len(some.messages) <= limit)
    lengths = [1 + len("a".join([*rounds[dropped:], "u"])) for dropped in range(1, len(rounds) + 1)]
    fitting = [number + 1 for number, length in enumerate(lengths) if length <= limit]
    assert (found[1] if found else None) == (fitting[0] if fitting else None)


def test_a_begun_answer_goes_on_with_the_models_very_next_bytes(folder: Path) -> None:
    """Two readers used to take the first space away: the tokenizer's and the one that trims answers."""
    begun = {"role": "assistant", "content": "Hello"}
    body = {"model": NAME, "max_tokens": 2, "temperature": 0, "add_generation_prompt": False}
    body |= {"messages": [{"role": "user", "content": "Hi"}, begun], "continue_final_message": True}
    for stream in (False, True):
        with serving(folder, script="world") as app:
            response = post(app, "/chat/completions", {**body, "stream": stream})
        if stream:
            text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks(response))
        else:
            text = response.json()["choices"][0]["message"]["content"]
        assert text.startswith(" w")
    with serving(folder, script="world") as app:
        whole = post(app, "/chat/completions", {"model": NAME, "max_tokens": 2, "messages": body["messages"][:1]})
    assert whole.json()["choices"][0]["message"]["content"].startswith("w")


def test_a_raw_completion_goes_on_with_the_models_very_next_bytes(folder: Path) -> None:
    with serving(folder, script="world") as app:
        body = {"model": NAME, "prompt": "Hello", "max_tokens": 2, "temperature": 0, "logprobs": 0}
        choice = post(app, "/completions", body).json()["choices"][0]
    assert choice["text"].startswith(" w")
    assert choice["text"] == "".join(choice["logprobs"]["tokens"])


FAR_TOO_LONG = "<|im_end|>\n" * 20_000


def test_a_prompt_far_beyond_the_context_is_refused_without_being_tokenized(app: Starlette) -> None:
    """Its characters alone prove that it does not fit: a thread that tokenizes it could not be stopped."""
    for path, body in (
        ("/chat/completions", {"messages": [{"role": "user", "content": FAR_TOO_LONG}]}),
        ("/chat/completions", {"messages": long_talk(8000), "max_tokens": 5}),
        ("/responses", {"input": FAR_TOO_LONG}),
        ("/completions", {"prompt": FAR_TOO_LONG}),
        ("/embeddings", {"input": FAR_TOO_LONG}),
    ):
        error = assert_openai_error(post(app, path, {"model": NAME, **body}), 400)
        assert error["code"] == "context_length_exceeded", path
        assert "at least" in error["message"], path


def test_white_space_beyond_the_context_is_tokenized(app: Starlette) -> None:
    """A tokenizer may join it, so its length proves nothing."""
    response = post(app, "/chat/completions", {**ANSWER, "messages": [{"role": "user", "content": "a" + " " * 200}]})
    assert response.status_code == 200


def test_rounds_far_beyond_the_context_are_dropped(dropping: Starlette) -> None:
    response = post(dropping, "/chat/completions", {**ANSWER, "messages": long_talk(5000)})
    assert response.status_code == 200
    assert int(response.headers[DROPPED_ROUNDS_HEADER]) > 4990
