"""vLLM behind our port and our own engine, on the same stored weights, asked by the same SDK."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import requests
from openai import BadRequestError, OpenAI

from tests.e2e.server import VLLM, Server, serving

if find_spec("vllm") is None:
    pytest.skip("vLLM has an environment of its own: `make test-vllm`", allow_module_level=True)

QUESTIONS = ["你好", "你是谁？", "Hello", "What is the capital of France?", "请介绍一下北京。", "1 + 1 = ?", "写一首诗"]
MODEL = "chatglm2-demo"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bentoml")


@pytest.fixture(scope="module")
def vllm(home: Path) -> Iterator[Server]:
    with serving(home / "vllm", VLLM) as running:
        yield running


@pytest.fixture(scope="module")
def native(home: Path) -> Iterator[Server]:
    with serving(home / "native", {"CHATGLM_PRECISION": "float32"}) as running:
        yield running


def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=120)


def greedy(server: Server, question: str, max_tokens: int = 48) -> tuple[list[bytes], list[float], str]:
    """The bytes and log-probabilities of every token, and why it ended."""
    answer = client(server).chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=max_tokens,
        logprobs=True,
        top_logprobs=5,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for token in logprobs.content:
        assert [other.logprob for other in token.top_logprobs] == sorted(
            (other.logprob for other in token.top_logprobs), reverse=True
        )
    return (
        [bytes(token.bytes or []) for token in logprobs.content],
        [token.logprob for token in logprobs.content],
        answer.choices[0].finish_reason,
    )


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_tokens_are_the_same_and_so_are_their_probabilities(question: str, vllm: Server, native: Server) -> None:
    theirs, ours = greedy(vllm, question), greedy(native, question)
    assert theirs[0] == ours[0]
    assert theirs[1] == pytest.approx(ours[1], abs=2e-3)
    assert theirs[2] == ours[2]


def test_raw_token_ids_continue_in_the_same_way(vllm: Server, native: Server) -> None:
    asked = {"model": MODEL, "prompt": list(range(300, 340)), "max_tokens": 24, "temperature": 0}
    texts = [
        requests.post(f"{server.base_url}/completions", json={**asked, "ignore_eos": True}, timeout=120).json()
        for server in (vllm, native)
    ]
    assert texts[0]["choices"][0]["text"] == texts[1]["choices"][0]["text"]
    assert texts[0]["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize(
    "settings",
    [
        {"frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"repetition_penalty": 1.3},
        {"logit_bias": {"432": -50}},
        {"min_tokens": 40},
        {"stop": ["ChatGLM"]},
        {"max_tokens": 3},
        {"top_p": 0},
    ],
    ids=str,
)
def test_settings_mean_the_same(settings: dict[str, object], vllm: Server, native: Server) -> None:
    """Each changes the greedy answer or its end; `top_p: 0` makes sampling greedy."""
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "你好"}],
        "temperature": 0 if "top_p" not in settings else 1.5,
        "max_tokens": 48,
        **settings,
    }
    replies = [
        requests.post(f"{server.base_url}/chat/completions", json=asked, timeout=120).json()
        for server in (vllm, native)
    ]
    assert replies[0]["choices"][0]["message"]["content"] == replies[1]["choices"][0]["message"]["content"]
    assert replies[0]["choices"][0]["finish_reason"] == replies[1]["choices"][0]["finish_reason"]
    assert replies[0]["usage"]["completion_tokens"] == replies[1]["usage"]["completion_tokens"]


def test_a_seed_repeats_an_answer_streaming_or_not(vllm: Server) -> None:
    def answer(stream: bool) -> str:
        asked = client(vllm).chat.completions
        messages = [{"role": "user", "content": "你好"}]
        if stream:
            parts = asked.create(
                model=MODEL, messages=messages, temperature=2, top_p=1, seed=7, max_tokens=20, stream=True
            )
            return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        whole = asked.create(model=MODEL, messages=messages, temperature=2, top_p=1, seed=7, max_tokens=20)
        return whole.choices[0].message.content or ""

    assert answer(stream=True) == answer(stream=False) != ""


def test_several_choices_are_separate_and_share_the_prompt(vllm: Server) -> None:
    messages = [{"role": "user", "content": "你好" * 200}]
    answers = client(vllm).chat.completions.create(
        model=MODEL, messages=messages, n=3, temperature=2, top_p=1, seed=1, max_tokens=12
    )
    assert sorted(choice.index for choice in answers.choices) == [0, 1, 2]
    assert len({choice.message.content for choice in answers.choices}) == 3
    # vLLM on a processor keeps blocks of 128 tokens
    again = client(vllm).chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=4)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens


SEASON = {
    "type": "object",
    "properties": {"name": {"enum": ["spring", "winter"]}, "cold": {"type": "boolean"}, "days": {"type": "integer"}},
    "required": ["name", "cold", "days"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["北京", "上海"]}}, "required": ["city"]},
    },
}
FORMS: list[dict[str, object]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "season", "schema": SEASON, "strict": True}}},
    {"response_format": {"type": "json_object"}},
    {"guided_regex": "[0-9]{3}-[a-f]{4}"},
    {"guided_choice": ["positive", "negative", "不知道"]},
    {"tools": [WEATHER], "tool_choice": "required"},
    {"tools": [WEATHER]},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(form))
def test_masks_hold_vllms_answers_as_they_hold_ours(form: dict[str, object], vllm: Server, native: Server) -> None:
    """Greedy answers are the same token for token; tool calls but for their random ids."""
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "你好"}],
        "temperature": 0,
        "max_tokens": 48,
        **form,
    }
    answers = []
    for server in (vllm, native):
        reply = requests.post(f"{server.base_url}/chat/completions", json=asked, timeout=120).json()
        (choice,) = reply["choices"]
        calls = [call["function"] for call in choice["message"].get("tool_calls") or []]
        answers.append((choice["message"]["content"], calls, choice["finish_reason"], reply["usage"]))
    for *_, usage in answers:
        usage.pop("prompt_tokens_details", None)
    assert answers[0] == answers[1]


def test_masked_and_free_requests_share_vllms_batches(vllm: Server) -> None:
    """Rows move within vLLM's batch as requests come and go; each keeps its own mask, streaming, sampled or greedy."""

    def ask(number: int) -> str:
        asked = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"{number} 你好"}],
            "temperature": 1.5,
            "top_p": 1,
            "seed": number,
            "max_tokens": 20 + number,
            **({"guided_regex": f"{number}[a-z]{{1,{number + 1}}}{number}"} if number % 2 else {}),
        }
        reply = requests.post(f"{vllm.base_url}/chat/completions", json=asked, timeout=120)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(24)))
    for number in range(1, 24, 2):
        assert re.fullmatch(f"{number}[a-z]{{1,{number + 1}}}{number}", texts[number]), texts[number]
    assert texts[1] == ask(1)


def test_what_vllm_cannot_do_is_refused_with_a_400(vllm: Server) -> None:
    with pytest.raises(BadRequestError) as refusal:
        client(vllm).embeddings.create(model=MODEL, input="你好")
    assert refusal.value.param == "input"


def test_a_client_that_leaves_ends_its_request(vllm: Server) -> None:
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "你好"}],
        "ignore_eos": True,
        "max_tokens": 4000,
        "stream": True,
    }
    reply = requests.post(f"{vllm.base_url}/chat/completions", json=asked, stream=True, timeout=60)
    lines = reply.iter_lines()
    for _ in range(5):
        next(lines)
    deadline = time.monotonic() + 60
    while not vllm.metrics()["chatglm_num_requests_running"] and time.monotonic() < deadline:
        next(lines)
    assert vllm.metrics()["chatglm_num_requests_running"] == 1
    reply.close()
    # vLLM says what it is doing with every step: the next request's last one finds only itself
    while time.monotonic() < deadline:
        greedy(vllm, "你好", max_tokens=2)
        if vllm.metrics()["chatglm_num_requests_running"] == 0:
            return
        time.sleep(0.5)
    raise AssertionError("the abandoned request still runs")


def test_its_tokens_are_counted(vllm: Server) -> None:
    before = vllm.metrics()["chatglm_generation_tokens_total"]
    greedy(vllm, "你好", max_tokens=5)
    time.sleep(1.5)  # the watch looks once a second
    assert vllm.metrics()["chatglm_generation_tokens_total"] == before + 5
