"""The chat page in a real browser, in front of a real server with the demonstration model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from models.demo.corpus import SAMPLE_ANSWER
from tests.e2e.browser import SLOW, SUM, OpenPage
from tests.e2e.server import Server, serving

if TYPE_CHECKING:
    from playwright.sync_api import Route


def test_a_question_is_answered_and_the_tokens_are_counted(visit: OpenPage) -> None:
    chat = visit()
    chat.ask("你好")
    assert chat.answer() == SAMPLE_ANSWER
    assert re.fullmatch(r"\d+ → \d+ tokens · [\d.]+ tokens/s · first token after [\d.]+ s", chat.stats())
    (body,) = chat.bodies
    assert body.pop("stream_options")["include_usage"] is True
    # the documented defaults are the server's: none of them is sent
    assert body == {"model": "chatglm2-demo", "messages": [{"role": "user", "content": "你好"}], "stream": True}


def test_an_answer_streams_is_stopped_and_made_again(visit: OpenPage) -> None:
    chat = visit()
    chat.slow_down(SLOW)
    chat.ask("write a short poem", wait=False)
    chat.wait_until("document.querySelector('.prose').textContent.length > 10")
    early = chat.answer()
    chat.wait_until("document.querySelector('.prose').textContent.length > 40")
    assert len(chat.answer()) > len(early)  # it grows while it is written
    chat.page.keyboard.press("Escape")
    chat.wait_for_answer()
    stopped = chat.answer()
    assert "Stopped" in chat.stats()
    assert "load it today" not in stopped
    chat.slow_down(-1)
    chat.page.click(".regenerate")
    chat.wait_until("document.querySelector('.prose').textContent.includes('load it today')")
    chat.wait_for_answer()
    assert len(chat.bodies) == 2
    assert chat.bodies[0]["messages"] == chat.bodies[1]["messages"]


def test_the_stop_button_stops(visit: OpenPage) -> None:
    chat = visit()
    chat.slow_down(SLOW)
    chat.ask("write a short poem", wait=False)
    chat.page.wait_for_selector(".prose:not(:empty)")
    chat.page.click("#stop")
    chat.wait_for_answer()
    assert "Stopped" in chat.stats()
    assert chat.page.is_visible("#send")


def test_an_edited_question_begins_a_branch_beside_what_followed(visit: OpenPage) -> None:
    chat = visit()
    chat.ask("hello")
    chat.ask("thanks")
    chat.page.hover(".turn:first-child .question")
    chat.page.click(".turn:first-child .edit")
    chat.page.keyboard.press("ControlOrMeta+A")
    chat.page.keyboard.type("1+1")
    chat.page.keyboard.press("Enter")
    chat.wait_for_answer()
    assert chat.page.locator(".turn").count() == 1
    assert chat.answer() == SUM
    assert chat.bodies[-1]["messages"] == [{"role": "user", "content": "1+1"}]
    assert chat.page.inner_text(".question .versions").strip() == "2/2"
    chat.page.click(".question .versions button:first-child")
    assert chat.page.locator(".turn").count() == 2
    assert chat.page.locator(".bubble").all_inner_texts() == ["hello", "thanks"]


def test_the_conversation_so_far_goes_along(visit: OpenPage) -> None:
    chat = visit()
    chat.ask("my name is Alice")
    chat.ask("what is my name")
    assert chat.answer() == "Your name is Alice."
    assert [message["role"] for message in chat.bodies[-1]["messages"]] == ["user", "assistant", "user"]


def test_conversations_outlive_a_reload_and_can_be_deleted_and_brought_back(visit: OpenPage) -> None:
    chat = visit()
    chat.ask("1+1")
    chat.page.click("#new")
    chat.ask("thanks")
    assert chat.titles() == ["thanks", "1+1"]
    chat.open()
    assert chat.titles() == ["thanks", "1+1"]
    chat.page.click("#list .entry >> text=1+1")
    assert chat.answer() == SUM
    chat.page.click("#list li:has([aria-current]) .remove")
    assert chat.titles() == ["thanks"]
    chat.page.click("#toast button")
    assert sorted(chat.titles()) == ["1+1", "thanks"]
    assert chat.answer() == SUM


def test_settings_show_the_documented_defaults_and_changes_are_sent(visit: OpenPage) -> None:
    chat = visit()
    chat.page.click("#open-settings")
    names = ("temperature", "top_p", "max_tokens")
    assert [chat.page.input_value(f"#set-{name}") for name in names] == ["0.95", "0.7", "2048"]
    chat.page.fill("#set-system", "You are a helpful assistant.")
    chat.page.fill("#set-temperature", "0")
    chat.page.fill("#set-max_tokens", "5")
    chat.page.select_option("#set-model", "chatglm2-6b")
    chat.page.keyboard.press("Escape")
    chat.ask("hello")
    body = chat.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "You are a helpful assistant."}
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("chatglm2-6b", 0, 5)
    assert "top_p" not in body
    assert "limit of 5 tokens" in chat.page.inner_text(".remark")
    chat.page.click("#open-settings")
    chat.page.click("#defaults")
    assert [chat.page.input_value(f"#set-{name}") for name in names] == ["0.95", "0.7", "2048"]


def test_enter_belongs_to_the_input_method_while_it_composes(visit: OpenPage) -> None:
    chat = visit()
    chat.page.fill("#question", "ni hao")
    chat.page.dispatch_event("#question", "keydown", {"key": "Enter", "isComposing": True})
    assert chat.page.input_value("#question") == "ni hao"
    assert chat.bodies == []


def test_the_last_question_is_edited_by_keyboard_alone(visit: OpenPage) -> None:
    chat = visit()
    chat.page.keyboard.type("hello")  # the question has the focus from the start
    chat.page.keyboard.press("Enter")
    chat.wait_for_answer()
    chat.page.focus("#question")
    chat.page.keyboard.press("ArrowUp")
    chat.page.keyboard.press("Escape")
    chat.page.focus("#question")
    chat.page.keyboard.press("ArrowUp")
    chat.page.keyboard.press("ControlOrMeta+A")
    chat.page.keyboard.type("1+1")
    chat.page.keyboard.press("Enter")
    chat.wait_until(f"document.querySelector('.prose').textContent.includes({SUM!r})")


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (429, "rate_limit_exceeded", "The server has too much to do right now. Try again in 7 s."),
        (400, "context_length_exceeded", "The conversation has grown too long"),
        (503, "model_loading", "The model is still being loaded."),
        (500, "server_error", "The server failed while answering."),
        (400, "invalid_value", "The server refused the request: because of this"),
    ],
)
def test_a_failure_is_a_sentence_and_can_be_tried_again(visit: OpenPage, status: int, code: str, sentence: str) -> None:
    chat = visit()
    error = {"error": {"message": "because of this", "type": "t", "param": None, "code": code}}
    chat.page.route("**/chat/completions", lambda r: r.fulfill(status=status, json=error, headers={"retry-after": "7"}))
    chat.ask("1+1")
    assert sentence in chat.page.inner_text(".failure")
    chat.page.unroute_all()
    chat.page.click(".regenerate")
    chat.page.wait_for_selector(".failure", state="detached")
    chat.wait_for_answer()
    assert chat.answer() == SUM


def test_broken_connections_are_sentences_and_what_was_written_stays(visit: OpenPage) -> None:
    chat = visit(locale="zh-CN")
    chat.page.route("**/chat/completions", lambda route: route.abort())
    chat.ask("你好")
    assert "无法连接服务" in chat.page.inner_text(".failure")
    chat.page.unroute_all()
    chunk = '{"choices": [{"index": 0, "delta": {"content": "half a"}, "finish_reason": null}]}'

    def cut(route: Route) -> None:
        route.fulfill(status=200, content_type="text/event-stream", body=f"data: {chunk}\n\n")

    chat.page.route("**/chat/completions", cut)
    chat.page.click(".regenerate")
    chat.page.wait_for_selector(".failure >> text=连接就断开了")
    assert chat.answer() == "half a"


def test_a_question_that_was_never_answered_is_not_sent_again(visit: OpenPage) -> None:
    chat = visit()
    chat.page.route("**/chat/completions", lambda route: route.abort())
    chat.ask("hello")
    chat.page.unroute_all()
    chat.ask("1+1")
    assert chat.answer() == SUM
    assert chat.bodies[-1]["messages"] == [{"role": "user", "content": "1+1"}]


def test_a_server_with_keys_asks_for_one(visit: OpenPage, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("bentoml-keys")
    with serving(home, {"CHATGLM_API_KEYS": "open-sesame"}) as locked:
        chat = visit(locked.url)
        assert chat.page.is_visible("#key-form")
        chat.page.fill("#key", "wrong")
        chat.page.press("#key", "Enter")
        chat.page.wait_for_selector("#key-error >> text=does not accept this key")
        chat.page.fill("#key", "open-sesame")
        chat.page.press("#key", "Enter")
        chat.page.wait_for_selector("#key-form", state="hidden")
        chat.ask("1+1")
        assert chat.answer() == SUM
        assert chat.page.evaluate("Object.values(localStorage).join().includes('open-sesame')") is False
        chat.open()
        assert not chat.page.is_visible("#key-form")  # this tab remembers it
        chat.page.click("#open-settings")
        chat.page.click("#forget-key")
        chat.page.wait_for_selector("#key-form:not([hidden])")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_narrow_screen_shows_everything_without_scrolling_sideways(visit: OpenPage, width: int) -> None:
    chat = visit(viewport={"width": width, "height": 640}, has_touch=True, is_mobile=True)
    chat.answer_with(
        f"# {'long' * 40}\n\n```python\n{'x = 1; ' * 60}\n```\n\n| a | b |\n|---|---|\n| {'w' * 300} | 2 |"
    )
    chat.ask("a" * 200)
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= width
    assert chat.page.evaluate("document.querySelector('#scroll').scrollWidth") <= width
    if width < 760:
        assert not chat.page.is_visible("#new")
        chat.page.click("#menu")
        chat.wait_until("document.querySelector('#sidebar').getBoundingClientRect().x === 0")
        chat.page.click("#new")
        assert chat.page.is_visible("#welcome")


def test_the_browsers_language_chooses_and_the_switch_stays(visit: OpenPage) -> None:
    chat = visit(locale="zh-TW")
    assert chat.page.get_attribute("#question", "placeholder") == "输入问题"
    chat.page.click("#language")
    assert chat.page.get_attribute("#question", "placeholder") == "Ask something"
    assert chat.page.get_attribute("html", "lang") == "en"
    chat.open()
    assert chat.page.inner_text("#new").strip() == "New chat"
    assert visit(locale="fr-FR").page.inner_text("#new").strip() == "New chat"


def test_dark_is_the_systems_choice_or_the_readers(visit: OpenPage) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    chat = visit(color_scheme="dark")
    assert chat.page.evaluate(ground) == "rgb(20, 22, 28)"
    chat.page.click("#theme")
    assert chat.page.evaluate(ground) == "rgb(255, 255, 255)"
    chat.page.click("#theme")
    assert chat.page.evaluate(ground) == "rgb(20, 22, 28)"
    assert visit(color_scheme="light").page.evaluate(ground) == "rgb(255, 255, 255)"


def test_the_home_page_links_to_the_chat_and_loads_nothing_from_elsewhere(visit: OpenPage, server: Server) -> None:
    chat = visit()
    chat.requested.clear()
    chat.page.goto(server.url)
    chat.page.wait_for_selector('[data-path="/v1/chat/completions"]')
    assert all(url.startswith((server.url, "data:")) for url in chat.requested)
    chat.requested.clear()
    chat.page.click("nav a.button")
    chat.page.wait_for_selector("#question")
    assert chat.page.url == f"{server.url}/chat"
