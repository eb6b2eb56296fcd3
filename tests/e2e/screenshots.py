"""Pictures of the chat page for the READMEs: `make screenshots` writes docs/images/chat-*.png."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e.browser import ChatPage, chromium
from tests.e2e.server import serving
from tests.golden_data import REPOSITORY

if TYPE_CHECKING:
    from playwright.sync_api import Browser

IMAGES = REPOSITORY / "docs" / "images"
LARGEST_BYTES = 200_000
DESKTOP: dict[str, Any] = {"viewport": {"width": 1200, "height": 740}, "device_scale_factor": 1.5}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 780}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True,
}  # fmt: skip
ENGLISH = ["tell me a joke", "what is the capital of China"], ["hello", "write hello world in Python"]
CHINESE = ["讲个笑话", "中国的首都是哪里"], ["你好", "用 Python 写 hello world"]
PICTURES: dict[str, tuple[dict[str, Any], tuple[list[str], list[str]]]] = {
    "chat-light": ({**DESKTOP, "locale": "en-US", "color_scheme": "light"}, ENGLISH),
    "chat-dark": ({**DESKTOP, "locale": "zh-CN", "color_scheme": "dark"}, CHINESE),
    "chat-phone": ({**PHONE, "locale": "zh-CN", "color_scheme": "light"}, (["讲个笑话"], ["你好", "一年有哪几个季节"])),
}


def take(browser: Browser, url: str, target: Path, options: dict[str, Any], asked: tuple[list[str], list[str]]) -> None:
    """A few short conversations, then the one to be seen."""
    context = browser.new_context(**options)
    chat = ChatPage(context.new_page(), url).open()
    before, shown = asked
    for question in [*before, shown[0]]:
        chat.page.evaluate("document.querySelector('#new').click()")  # it may be hidden beside a narrow screen
        chat.ask(question)
    for question in shown[1:]:
        chat.ask(question)
    chat.page.mouse.move(0, 0)
    chat.page.screenshot(path=target)
    context.close()
    chat.assert_it_behaved()


def main() -> int:
    """0 if every picture was taken and is small."""
    with tempfile.TemporaryDirectory() as home, serving(Path(home)) as server, chromium() as browser:
        for name, (options, asked) in PICTURES.items():
            target = IMAGES / f"{name}.png"
            take(browser, server.url, target, options, asked)
            print(f"{target.relative_to(REPOSITORY)}  {target.stat().st_size // 1000} kB", flush=True)
    return max((IMAGES / f"{name}.png").stat().st_size for name in PICTURES) > LARGEST_BYTES


if __name__ == "__main__":
    sys.exit(main())
