"""The pages: strict policies, nothing from other hosts, revalidation, compression, and the chat page turned off."""

from __future__ import annotations

import re

import httpx2
import pytest
from starlette.applications import Starlette

from serving.http.pages import ASSETS, FOLDER, page_routes
from tests.contract.tiny import send
from tests.golden_data import REPOSITORY

APP = Starlette(routes=page_routes(has_chat=True))
FILES = [f"{ASSETS}/{file.relative_to(FOLDER).as_posix()}" for s in (".js", ".css") for file in FOLDER.rglob(f"*{s}")]


@pytest.mark.parametrize("path", ["/", "/chat", *FILES, f"{ASSETS}/icon.svg"])
def test_every_file_has_a_strict_policy_and_a_type(path: str) -> None:
    reply = send(APP, "GET", path)
    assert reply.status_code == 200
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; " in policy
    assert "unsafe-eval" not in policy
    assert ("unsafe-inline" in policy) == (path == "/")  # Swagger's styles, on the page that holds no model output
    assert "frame-ancestors 'none'" in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert not reply.headers["content-type"].startswith("application/octet-stream")


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
def test_a_second_visit_costs_nothing(encoding: str) -> None:
    first = send(APP, "GET", "/chat", headers={"accept-encoding": encoding})
    assert first.headers["cache-control"] == "no-cache"
    assert first.content == (FOLDER / "chat.html").read_bytes()
    headers = {"if-none-match": first.headers["etag"], "accept-encoding": encoding}
    again = send(APP, "GET", "/chat", headers=headers)
    assert (again.status_code, again.content) == (304, b"")
    assert send(APP, "GET", f"{ASSETS}/app.js", headers=headers).status_code == 200


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    for name in ("chat.html", "home.html"):
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", text), name
        addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
        assert addresses
        assert all(address.startswith(("./", "#")) for address in addresses), name
    own = [path for path in FOLDER.rglob("*") if path.suffix in (".js", ".css") and path.parent.name != "vendor"]
    for path in own:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|\beval\b|new Function", text), path.name


def test_every_style_sheet_and_script_of_the_page_is_used() -> None:
    text = (FOLDER / "chat.html").read_text(encoding="utf-8") + (FOLDER / "home.html").read_text(encoding="utf-8")
    styles = {path.name for path in FOLDER.glob("*.css")}
    assert {name for name in styles if f'"./page/{name}"' not in text} == set()
    assert all(path.read_text(encoding="utf-8").count("\n") <= 400 for path in FOLDER.glob("*.*s"))


def test_switched_off_there_is_no_chat_page_and_no_link_to_it() -> None:
    off = Starlette(routes=page_routes(has_chat=False))
    assert send(off, "GET", "/chat").status_code == 404
    assert send(off, "GET", f"{ASSETS}/app.js").status_code == 404
    home = send(off, "GET", "/").text
    assert "./chat" not in home
    assert "swagger-ui" in home
    assert "./chat" in send(APP, "GET", "/").text


def test_both_languages_have_the_same_words() -> None:
    text = (FOLDER / "words.js").read_text(encoding="utf-8")
    english, chinese = text.split("  zh: {")
    pattern = re.compile(r"^ +(\w+): ", re.MULTILINE)
    ours = [name for name in pattern.findall(english) if name != "en"]
    assert ours == pattern.findall(chinese.split("\n};")[0])


def test_the_bundle_is_what_its_lock_file_says() -> None:
    """A new version in web/package.json without `make page-vendor` is noticed."""
    import json

    notice = (FOLDER / "vendor" / "NOTICE").read_text(encoding="utf-8")
    wanted = json.loads((REPOSITORY / "web" / "package.json").read_text(encoding="utf-8"))["devDependencies"]
    for name in ("markdown-it", "highlight.js", "dompurify"):
        assert f"\n{name} {wanted[name]} (" in notice
    assert "resolved" not in (REPOSITORY / "web" / "package-lock.json").read_text(encoding="utf-8")


def test_a_file_outside_the_folder_is_not_served() -> None:
    assert (FOLDER.parent / "build.mjs").exists()
    for path in (f"{ASSETS}/../build.mjs", f"{ASSETS}/%2e%2e/build.mjs", f"{ASSETS}/vendor/NOTICE"):
        reply: httpx2.Response = send(APP, "GET", path)
        assert reply.status_code == 404
