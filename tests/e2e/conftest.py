"""One running server for all end-to-end tests that only talk to it, and a browser in front of it.

TEST_ENGINE=vllm puts vLLM behind the server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.browser import ChatPage, OpenPage, chromium
from tests.e2e.server import VLLM, Server, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = VLLM if os.environ.get("TEST_ENGINE") == "vllm" else None
    with serving(tmp_path_factory.mktemp("bentoml"), settings) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[OpenPage]:
    """Opens the page in a fresh profile; after the test it must have behaved. `script` runs before the page's own."""
    opened: list[ChatPage] = []

    def open_page(url: str = server.url, script: str = "", **options: Any) -> ChatPage:
        context = browser.new_context(**{"locale": "en-US", **options})
        context.add_init_script(script)
        chat = ChatPage(context.new_page(), url)
        opened.append(chat)
        return chat.open()

    yield open_page
    for chat in opened:
        chat.page.context.close()
        chat.assert_it_behaved()
