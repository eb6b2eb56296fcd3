"""Everything beside chat: raw completions, models, and the words of the tokenizer."""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI
from openai.types import Completion, Model
from starlette.applications import Starlette

from serving.openai.router import create_app
from serving.registry import ModelRegistry, ServedModel
from tests.contract.tiny import CONTEXT, NAME, assert_openai_error, chunks, post, sdk, send

ASK: dict[str, Any] = {"model": NAME, "prompt": "Hello", "max_tokens": 6, "seed": 5}


def test_the_sdk_reads_a_completion_and_its_stream_says_the_same(app: Starlette) -> None:
    async def whole(client: AsyncOpenAI) -> Completion:
        return await client.completions.create(**ASK, logprobs=2, n=2)

    async def streamed(client: AsyncOpenAI) -> list[Completion]:
        return [part async for part in await client.completions.create(**ASK, logprobs=2, n=2, stream=True)]

    expected, parts = sdk(app, whole), sdk(app, streamed)
    assert expected.object == "text_completion"
    for choice in expected.choices:
        own = [c for part in parts for c in part.choices if c.index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        assert own[-1].finish_reason == choice.finish_reason
        assert choice.logprobs
        assert [name for c in own if c.logprobs for name in c.logprobs.tokens or []] == choice.logprobs.tokens
        assert [o for c in own if c.logprobs for o in c.logprobs.text_offset or []] == choice.logprobs.text_offset


def test_several_prompts_are_answered_under_neighbouring_indices(app: Starlette) -> None:
    def texts(prompt: Any, n: int) -> list[str]:
        body = {**ASK, "prompt": prompt, "n": n, "temperature": 0}
        response = post(app, "/completions", body)
        assert response.status_code == 200, response.text
        choices = response.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        return [choice["text"] for choice in choices]

    assert texts(["Hello", "world"], 2) == texts("Hello", 2) + texts("world", 2)
    streamed = chunks(
        post(app, "/completions", {**ASK, "prompt": ["Hello", "world"], "temperature": 0, "stream": True})
    )
    glued = ["".join(c["text"] for part in streamed for c in part["choices"] if c["index"] == i) for i in (0, 1)]
    assert glued == texts(["Hello", "world"], 1)


def test_token_ids_are_taken_as_they_are(app: Starlette) -> None:
    ids = post(app, "/tokenize", {"model": NAME, "prompt": "Hello"}).json()["tokens"]
    by_text = post(app, "/completions", ASK).json()
    by_ids = post(app, "/completions", {**ASK, "prompt": ids}).json()
    by_list = post(app, "/completions", {**ASK, "prompt": [ids, ids]}).json()
    assert by_ids["choices"] == by_text["choices"]
    assert [choice["text"] for choice in by_list["choices"]] == [by_text["choices"][0]["text"]] * 2
    assert by_list["usage"]["prompt_tokens"] == 2 * by_text["usage"]["prompt_tokens"]


def test_echo_puts_the_prompt_first_whole_and_streamed(app: Starlette) -> None:
    plain = post(app, "/completions", ASK).json()["choices"][0]["text"]
    assert post(app, "/completions", {**ASK, "echo": True}).json()["choices"][0]["text"] == "Hello" + plain
    parts = chunks(post(app, "/completions", {**ASK, "echo": True, "stream": True}))
    assert parts[0]["choices"][0]["text"] == "Hello"
    assert "".join(part["choices"][0]["text"] for part in parts) == "Hello" + plain


def test_best_of_returns_n_of_its_candidates(app: Starlette) -> None:
    best = post(app, "/completions", {**ASK, "n": 2, "best_of": 4}).json()
    candidates = post(app, "/completions", {**ASK, "n": 4}).json()
    assert len(best["choices"]) == 2
    assert {c["text"] for c in best["choices"]} <= {c["text"] for c in candidates["choices"]}
    assert best["choices"][0]["logprobs"] is None
    assert best["usage"]["completion_tokens"] == candidates["usage"]["completion_tokens"]


def test_the_default_length_of_a_completion_is_openais(app: Starlette) -> None:
    body = {"model": NAME, "prompt": "Hello", "ignore_eos": True}
    assert post(app, "/completions", body).json()["usage"]["completion_tokens"] == 16


def test_a_stream_of_completions_tells_its_usage_on_request(app: Starlette) -> None:
    body = {**ASK, "prompt": ["Hello", "world"], "stream": True, "stream_options": {"include_usage": True}}
    parts = chunks(post(app, "/completions", body))
    assert parts[-1]["choices"] == []
    whole = post(app, "/completions", {**ASK, "prompt": ["Hello", "world"]}).json()
    assert parts[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert all(part["usage"] is None for part in parts[:-1])


def test_models_are_listed_under_all_their_names(app: Starlette) -> None:
    async def listed(client: AsyncOpenAI) -> list[str]:
        return [model.id async for model in client.models.list()]

    async def one(client: AsyncOpenAI) -> Model:
        return await client.models.retrieve("chatglm")

    assert sdk(app, listed) == [NAME, "chatglm", "gpt-3.5-turbo"]
    assert sdk(app, one).model_dump(exclude_unset=True) == {
        "id": "chatglm",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "library",
        "root": NAME,
        "state": "loaded",
        "abilities": ["chat", "embeddings"],
        "family": "",
        "precision": "",
        "max_model_len": CONTEXT,
        "memory_bytes": 0,
    }


def test_any_model_name_is_accepted_where_that_is_set() -> None:
    app = create_app(ModelRegistry([ServedModel(NAME)], accept_any=True))
    assert send(app, "GET", "/models/org/what-ever").json()["id"] == "org/what-ever"


def test_ids_become_the_text_that_they_came_from(app: Starlette) -> None:
    told = post(app, "/tokenize", {"model": NAME, "prompt": "Hello 你好", "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 256
    text = post(app, "/detokenize", {"model": NAME, "tokens": told["tokens"]}).json()
    assert text == {"prompt": "Hello 你好"}


def test_a_conversation_is_tokenized_as_it_would_be_answered(app: Starlette) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    ids = post(app, "/tokenize", {"model": NAME, "messages": messages}).json()["tokens"]
    raw = post(app, "/completions", {**ASK, "prompt": ids, "temperature": 0}).json()
    chat = post(app, "/chat/completions", {"model": NAME, "messages": messages, "max_tokens": 6, "temperature": 0})
    assert chat.json()["choices"][0]["message"]["content"] == raw["choices"][0]["text"].strip()


def test_bad_ids_and_half_requests_are_refused(app: Starlette) -> None:
    error = assert_openai_error(post(app, "/detokenize", {"model": NAME, "tokens": [5, 99_999]}), 400)
    assert error["param"] == "tokens[1]"
    assert_openai_error(post(app, "/tokenize", {"model": NAME}), 400)
    assert_openai_error(post(app, "/tokenize", {"model": NAME, "prompt": "a", "messages": []}), 400)


def test_without_the_catch_all_only_known_paths_are_ours() -> None:
    app = create_app(ModelRegistry([ServedModel(NAME)]), catch_all=False)
    assert {getattr(route, "path", "") for route in app.routes} >= {"/chat/completions", "/models"}
    assert not any("{path" in getattr(route, "path", "") for route in app.routes)
    assert_openai_error(send(app, "GET", "/chat/completions"), 405)
