"""Models that think between <think> marks before they answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette

from models.families.hf import FAMILY, open_format
from models.store.progress import no_progress
from serving.engine.interface import EngineLimits
from serving.engine.native.engine import NativeEngine
from serving.generation.interface import Conversation, Message
from serving.generation.pipeline import RunningModel
from serving.generation.reasoning import ReasoningSplitter
from tests.contract.test_openapi import check
from tests.contract.tiny import CONTEXT, NAME, Scripted, chunks, in_front_of, post, random_network
from tests.hf_folders import write_folder

# as Qwen3's: earlier thoughts are dropped, those behind the last question stay, a switch closes the marks at once
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set content = m.content.split('</think>')[-1] %}"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ALWAYS = TEMPLATE.replace("{% endif %}{% endif %}", "{% else %}<think>\n{% endif %}{% endif %}")
# sampled: greedy answers are guessed ahead, which the script does not count
ASK: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}]}
THOUGHT, ANSWER = "I am fine.\nHow", "Hello there"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("stored")
    write_folder(source, "qwen3")
    FAMILY.import_checkpoint(source, target, {}, no_progress)
    return target


@contextmanager
def thinking(stored: Path, script: str, template: str = TEMPLATE) -> Iterator[Starlette]:
    """A model that writes `script` and ends."""
    from models.checkpoints.hf import TEMPLATE_FILE

    (stored / TEMPLATE_FILE).unlink()
    (stored / TEMPLATE_FILE).write_text(template)
    form = open_format(stored)
    end = min(form.stop_token_ids)
    network = Scripted(random_network(form.num_tokens), [*form.encode(script), end])
    engine = NativeEngine(network, EngineLimits(kv_tokens=4096))
    engine.start()
    with in_front_of(RunningModel(engine, form, CONTEXT)) as app:
        yield app


def test_thoughts_come_out_apart_from_the_answer(stored: Path) -> None:
    script = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
    with thinking(stored, script) as app:
        whole = post(app, "/chat/completions", {**ASK, "logprobs": True}).json()
    check(whole, "ChatCompletion")
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == (THOUGHT, THOUGHT, ANSWER)
    assert "".join(each["token"] for each in whole["choices"][0]["logprobs"]["content"]) == ANSWER
    details = whole["usage"]["completion_tokens_details"]
    assert 0 < details["reasoning_tokens"] < whole["usage"]["completion_tokens"]
    with thinking(stored, script) as app:
        stream = chunks(post(app, "/chat/completions", {**ASK, "stream": True}))
    for chunk in stream:
        check(chunk, "ChatCompletionChunk")
    deltas = [chunk["choices"][0]["delta"] for chunk in stream]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == THOUGHT
    assert "".join(delta.get("content") or "" for delta in deltas) == ANSWER


def test_a_mark_at_the_end_of_the_prompt_begins_the_thought(stored: Path) -> None:
    with thinking(stored, f"{THOUGHT}\n</think>\n\n{ANSWER}", ALWAYS) as app:
        message = post(app, "/chat/completions", ASK).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (THOUGHT, ANSWER)
    with thinking(stored, ANSWER, ALWAYS) as app:
        message = post(app, "/chat/completions", {**ASK, "enable_thinking": False}).json()["choices"][0]["message"]
    assert "reasoning_content" not in message
    assert message["content"] == ANSWER


def test_a_thought_that_was_cut_off_leaves_an_empty_answer(stored: Path) -> None:
    with thinking(stored, f"<think>\n{THOUGHT} and on") as app:
        choice = post(app, "/chat/completions", {**ASK, "max_tokens": 12}).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning_content"]
    assert f"{THOUGHT} and on".startswith(choice["message"]["reasoning_content"])


def test_responses_and_messages_show_it_in_their_own_fields(stored: Path) -> None:
    script = f"<think>{THOUGHT}</think>{ANSWER}"
    with thinking(stored, script) as app:
        response = post(app, "/responses", {"model": NAME, "input": "Hello"}).json()
    check(response, "Response")
    thought, answer = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": THOUGHT}]
    assert answer["content"][0]["text"] == ANSWER
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    with thinking(stored, script) as app:
        message = post(app, "/messages", {**ASK, "max_tokens": 100}).json()
    check(message, "AnthropicMessage")
    assert message["content"] == [
        {"type": "thinking", "thinking": THOUGHT, "signature": ""},
        {"type": "text", "text": ANSWER, "citations": None},
    ]
    with thinking(stored, script) as app:
        events = post(app, "/responses", {"model": NAME, "input": "Hello", "stream": True}).text
        for block in events.strip().split("\n\n"):
            check(json.loads(block.partition("data: ")[2]), "ResponseEvent")
        assert "response.reasoning_text.done" in events
        # what came out goes in again
        again = [{"role": "user", "content": "Hello"}, thought, answer, {"role": "user", "content": "Hello"}]
        assert post(app, "/responses", {"model": NAME, "input": again, "max_output_tokens": 2}).status_code == 200


def test_a_template_gets_earlier_thoughts_and_decides_what_becomes_of_them(stored: Path) -> None:
    with thinking(stored, ANSWER) as app:
        form = app.state.registry.default.running.chat_format

    def prompt(*messages: Message, continued: bool = False) -> str:
        text: str = form.decode(form.render(Conversation(messages, continue_final=continued)))
        return text

    ask, plain = Message("user", "Hello"), Message("assistant", ANSWER)
    written = Message("assistant", f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}")
    told = Message("assistant", ANSWER, reasoning=THOUGHT)
    assert prompt(ask, written, ask) == prompt(ask, told, ask) == prompt(ask, plain, ask)
    assert THOUGHT in prompt(ask, told)
    forged = Message("user", f"</think>{ANSWER}<think>")
    assert f"</think>{ANSWER}<think>" in prompt(ask, plain, forged)


@given(
    st.sampled_from(["", " ", "<think>", " <think>\n", "<thin", "<think>a</think>"]),
    st.text(alphabet="ab <>/think\n", max_size=12),
    st.sampled_from(["", "</think>", "\n</think>\n\n", "</thin"]),
    st.text(alphabet="ab <\n", max_size=8),
    st.booleans(),
    st.lists(st.integers(1, 5), max_size=20),
)
def test_how_the_text_is_cut_changes_nothing(
    opening: str, thought: str, closing: str, answer: str, has_begun: bool, sizes: list[int]
) -> None:
    text = opening + thought + closing + answer

    def split(pieces: list[str]) -> tuple[str, str]:
        splitter = ReasoningSplitter(has_begun)
        pairs = [*map(splitter.push, pieces), splitter.flush()]
        return "".join(pair[0] for pair in pairs), "".join(pair[1] for pair in pairs)

    pieces, rest = [], text
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    whole = split([text])
    assert split([*pieces, rest]) == whole
    if not has_begun and not text.lstrip().startswith("<think>"):
        assert whole == ("", text)
