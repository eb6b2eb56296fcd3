"""A real Chromium, driven by Playwright; nothing of it is fetched, the tests skip where it is missing."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ANSWER_MS = 120_000  # machines may be busy
SUM = "It is two: 1 + 1 = 2."  # a short answer of the demonstration model to 1+1
SLOW = 3000  # bytes a second: about eight tokens
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium_path() -> str | None:
    """CHROMIUM names another one than what is on the PATH."""
    chosen = os.environ.get("CHROMIUM", "")
    return chosen or next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: make test-setup")
    path = chromium_path()
    if path is None:
        pytest.skip("Chromium is missing: apt-get install chromium, or CHROMIUM=/path/to/it")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class ChatPage:
    """The chat page as a person uses it, with an eye on everything that it does."""

    page: Page
    url: str
    complaints: list[str] = field(default_factory=list)  # of scripts and of the content policy
    requested: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of the chat requests
    dialogs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self._heard(message.type, message.text))
        self.page.on("request", lambda request: self._requested(request.url, request.post_data))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))

    def _heard(self, kind: str, text: str) -> None:
        if kind == "error" and "status of" not in text and "net::ERR" not in text:
            self.complaints.append(text)

    def _requested(self, url: str, data: str | None) -> None:
        self.requested.append(url)
        if url.endswith("/v1/chat/completions") and data:
            self.bodies.append(json.loads(data))

    def open(self) -> ChatPage:
        self.page.goto(f"{self.url}/chat")
        self.page.wait_for_selector("#model:not(:empty), #key-form:not([hidden])")
        return self

    def ask(self, question: str, wait: bool = True) -> None:
        self.page.fill("#question", question)
        if self.page.evaluate("matchMedia('(hover: none) and (pointer: coarse)').matches"):
            self.page.click("#send")  # on a phone, Enter makes a line
        else:
            self.page.press("#question", "Enter")
        if wait:
            self.wait_for_answer()

    def wait_for_answer(self) -> None:
        self.page.wait_for_selector(".turn:last-child .regenerate", timeout=ANSWER_MS)

    def wait_until(self, expression: str, seconds: float = 60.0) -> None:
        """Until an expression is true; asked from outside, since the page's policy forbids `eval` inside it."""
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, expression
            self.page.wait_for_timeout(30)

    def answer(self) -> str:
        return self.page.inner_text(".turn:last-child .answer > .prose").strip()

    def stats(self) -> str:
        return self.page.inner_text(".turn:last-child .stats")

    def titles(self) -> list[str]:
        return self.page.locator("#list .entry").all_inner_texts()

    def slow_down(self, bytes_per_second: int) -> None:
        """Let everything arrive slowly, as over a bad line."""
        session = self.page.context.new_cdp_session(self.page)
        session.send("Network.enable")
        session.send(
            "Network.emulateNetworkConditions",
            {"offline": False, "latency": 0, "downloadThroughput": bytes_per_second, "uploadThroughput": -1},
        )

    def answer_with(self, text: str) -> None:
        """From now on the model says this, whatever it is asked."""
        self.page.unroute_all()
        self.page.route("**/v1/chat/completions", lambda route: _fulfil(route, text))

    def assert_it_behaved(self) -> None:
        assert self.complaints == []
        assert self.dialogs == []
        own = (f"{self.url}/chat", f"{self.url}/page/", f"{self.url}/v1/")
        assert [url for url in self.requested if not url.startswith(own)] == []


OpenPage = Callable[..., ChatPage]


def _fulfil(route: Route, text: str) -> None:
    pieces: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    pieces += [{"content": text[start : start + 7]} for start in range(0, len(text), 7)]
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in pieces]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    route.fulfill(status=200, content_type="text/event-stream", body="".join(lines) + "data: [DONE]\n\n")
